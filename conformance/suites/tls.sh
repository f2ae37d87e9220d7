#!/usr/bin/env bash
# about: TLS of tunnels as OpenSSL sees it: versions, ciphers, ALPN, and whose certificates are believed
# budget: 300
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_tool openssl openssl
cairn
address=127.77.0.1:15008
openssl version | sed 's/^/note: /'
cd "$work"

# An authority in a folder: authority NAME SUBJECT
authority() {
	mkdir -p "$1/issued"
	touch "$1/index.txt"
	echo 1000 >"$1/serial"
	echo 01 >"$1/crlnumber"
	cat >"$1/ca.cnf" <<-TEXT
		[ca]
		default_ca = here
		[here]
		dir = $work/$1
		database = \$dir/index.txt
		serial = \$dir/serial
		crlnumber = \$dir/crlnumber
		new_certs_dir = \$dir/issued
		certificate = \$dir/root.pem
		private_key = \$dir/key.pem
		default_md = sha256
		default_crl_days = 1
		policy = any
		unique_subject = no
		copy_extensions = none
		[any]
		organizationName = optional
		commonName = optional
	TEXT
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "/O=$2" -keyout "$1/key.pem" -out "$1/root.pem" \
		-addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
}

# issue AUTHORITY NAME SAN [openssl ca option...]: NAME.pem and NAME.key
issue() {
	local from=$1 name=$2 san=$3
	shift 3
	openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/O=workload" -keyout "$name.key" -out "$name.csr"
	printf 'keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=critical,CA:FALSE\nauthorityKeyIdentifier=keyid\n%s\n' \
		"${san:+subjectAltName=critical,$san}" >"$name.ext"
	openssl ca -batch -notext -config "$from/ca.cnf" -in "$name.csr" -out "$name.pem" -extfile "$name.ext" "${@:--days}" ${1:-1}
}

id=URI:spiffe://cluster.local/ns/app/sa
{
	authority mesh mesh
	authority other other
	authority next next
	issue mesh waypoint "$id/waypoint"
	issue mesh client "$id/client"
	issue mesh revoked "$id/revoked"
	issue mesh foreign URI:spiffe://foreign.example/ns/app/sa/client
	issue mesh nobody ""
	issue mesh several "$id/one,$id/two"
	openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/O=workload" -keyout expired.key -out expired.csr
	openssl ca -batch -notext -config mesh/ca.cnf -in expired.csr -out expired.pem -extfile client.ext -startdate 20200101000000Z -enddate 20200102000000Z
	openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/O=workload" -keyout early.key -out early.csr
	openssl ca -batch -notext -config mesh/ca.cnf -in early.csr -out early.pem -extfile client.ext -startdate 20900101000000Z -enddate 20900102000000Z
	issue other stranger "$id/client"
	# The next root, signed by the one that is believed: how a mesh goes from one authority to another.
	openssl req -new -key next/key.pem -subj "/O=next" -out next/cross.csr
	printf 'basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n' >next/cross.ext
	openssl ca -batch -notext -config mesh/ca.cnf -in next/cross.csr -out next/cross.pem -extfile next/cross.ext -days 1
	issue next crossed "$id/client"
	cat crossed.pem next/cross.pem >crossed-chain.pem
	mkdir certs
	cp waypoint.pem certs/cert-chain.pem
	cp waypoint.key certs/key.pem
	cp mesh/root.pem certs/root-cert.pem
} >openssl.log 2>&1 || { tail -20 openssl.log; exit 1; }

"$cairn" run --config "$conformance"/fixtures/xds/istio-1.31*/01-http-basic --certs certs --listen "$address" >cairn.log 2>&1 &
at_exit "kill $! 2>/dev/null"
for ((try = 0; try < 100; try++)); do
	grep -q "listening for tunnels" cairn.log && break
	sleep 0.1
done

passed=0 failed=0
check() { # check WHAT PATTERN: the last dialogue must show it
	if grep -aqE -- "$2" out; then
		passed=$((passed + 1))
	else
		failed=$((failed + 1))
		note "failed: $1: no '$2' in: $(tr '\n\0' '| ' <out | tail -c 600)"
	fi
}
# dial [s_client option...]: begins HTTP/2, and waits for what the server makes of it.
dial() {
	{ printf 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0'; sleep 0.7; } |
		timeout 10 openssl s_client -connect "$address" -CAfile mesh/root.pem "$@" >out 2>&1 || true
}
as() { # as NAME: the options of a client
	echo "-alpn h2 -cert $1.pem -key $1.key"
}
refused() { # refused WHAT ALERT OPTION...: by this alert of TLS
	local what=$1 alert=$2
	shift 2
	dial "$@"
	check "$what" "alert number $alert\$"
}

dial $(as client)
check "a client of the mesh speaks TLS 1.3" 'Protocol *: TLSv1.3|New, TLSv1.3'
check "ALPN is h2" '^ALPN protocol: h2$'
check "the server's certificate is verified" 'Verify return code: 0 \(ok\)'
check "a client certificate is asked for" '^Acceptable client certificate CA names|^Client Certificate Types|^Requested Signature Algorithms'
check "nothing is renegotiated" 'Secure Renegotiation IS NOT supported'
check "no compression" '^Compression: NONE'
if grep -aq 'alert number' out; then
	failed=$((failed + 1))
	note "failed: the mesh's own client is refused: $(tail -c 300 out)"
fi
for cipher in TLS_AES_128_GCM_SHA256 TLS_AES_256_GCM_SHA384; do
	dial $(as client) -ciphersuites $cipher
	check "$cipher" "Cipher is $cipher"
done
refused "a cipher that is not in the list" 40 $(as client) -ciphersuites TLS_AES_128_CCM_SHA256
refused "TLS 1.2" 70 $(as client) -tls1_2
dial $(as client) -tls1_1 -cipher ALL:@SECLEVEL=0
check "TLS 1.1" 'Cipher is \(NONE\)'
refused "no client certificate" 116 -alpn h2
refused "another protocol" 120 -alpn http/1.1 -cert client.pem -key client.key
refused "a certificate of another authority" 48 $(as stranger)
refused "an expired certificate" 45 $(as expired)
refused "a certificate of another trust domain" 46 $(as foreign)
refused "a certificate that names nobody" 46 $(as nobody)
refused "a certificate that names two" 46 $(as several)
dial $(as early)
check "a certificate of the future" 'alert number 4[0-9]$'
dial -alpn h2 -cert crossed.pem -key crossed.key
check "a certificate of the next root, without what signs it" 'alert number 48$'
dial -alpn h2 -cert crossed.pem -key crossed.key -cert_chain next/cross.pem
if grep -aq 'alert number' out; then
	failed=$((failed + 1))
	note "failed: a chain over a cross-signed root is refused: $(tail -c 300 out)"
else
	passed=$((passed + 1))
fi

# Revocation takes effect without a restart; so does its end.
openssl ca -config mesh/ca.cnf -revoke revoked.pem >>openssl.log 2>&1
openssl ca -config mesh/ca.cnf -gencrl -out crl.pem >>openssl.log 2>&1
dial $(as revoked)
check "before the list is there" '^ALPN protocol: h2$'
mv crl.pem certs/ca-crl.pem
for ((try = 0; try < 100; try++)); do
	grep -aq "revocation lists in use.*lists=1" cairn.log && break
	grep -aq "lists=1" cairn.log && break
	sleep 0.2
done
refused "a revoked certificate" 44 $(as revoked)
dial $(as client)
if grep -aq 'alert number' out; then
	failed=$((failed + 1))
	note "failed: a list of others' certificates refuses the mesh's client: $(tail -c 300 out)"
else
	passed=$((passed + 1))
fi
counts "$passed" "$failed"
((failed == 0))
