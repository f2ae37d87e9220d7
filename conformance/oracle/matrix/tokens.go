package matrix

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"

	"oracle/golden"
)

// tokenKey signs the tokens of the suite. It was made for these files and protects nothing.
//
//go:embed token-key.pem
var tokenKey []byte

const (
	issuer = "https://issuer.example.com"
	second = "https://second.example.com"
	later  = 4102444800 // 2100
)

// claims are the tokens that requests carry.
var claims = []struct {
	name string
	object
}{
	{"alice", object{"iss": issuer, "sub": "alice", "aud": "web", "azp": "web-client", "groups": []string{"admins", "users"}, "realm": object{"roles": []string{"ops-eu", "dev"}, "tier": "gold"}, "level": 7, "exp": later}},
	{"bob", object{"iss": issuer, "sub": "bob", "aud": []string{"web", "api"}, "groups": []string{"dev-1"}, "realm": object{"roles": []string{"dev"}, "tier": "silver", "deep": object{"er": "yes"}}, "scope": "read write", "exp": later}},
	{"carol", object{"iss": issuer, "sub": "carol", "aud": "api", "azp": "other", "groups": "admins users", "scope": "admin", "vip": true, "exp": later}},
	{"dave", object{"iss": second, "sub": "dave", "aud": "web", "groups": []string{"users"}, "realm": object{"roles": "ops-eu"}, "exp": later}},
	{"alice-elsewhere", object{"iss": second, "sub": "alice", "groups": []string{}, "realm": "none", "exp": later}},
	{"nobody", object{"iss": issuer, "aud": "web", "groups": []string{"admins"}, "exp": later}},
	{"expired", object{"iss": issuer, "sub": "alice", "aud": "web", "groups": []string{"admins"}, "exp": 1700000000}},
	{"early", object{"iss": issuer, "sub": "alice", "aud": "web", "nbf": later - 1, "exp": later}},
	{"unknown", object{"iss": "https://unknown.example.com", "sub": "alice", "aud": "web", "exp": later}},
	{"plain-issuer", object{"iss": "issuer.example.com", "sub": "a/b", "aud": "web", "exp": later}},
}

var requestPrincipals = []value{
	{issuer + "/alice", []string{"alice"}}, {issuer + "/*", []string{"alice", "bob", "carol"}}, {"*/alice", []string{"alice", "alice-elsewhere"}}, {"*", []string{"dave", "bob", "nobody"}},
}

func carries(a *asked, v string) { a.token = v }

var tokenSources = append([]field{{"requestPrincipals", requestPrincipals, true, carries}, {"requestPrincipals", requestPrincipals, true, carries}}, sourceFields[:2]...)

var claimKeys = []field{
	{"request.auth.principal", requestPrincipals, true, carries},
	{"request.auth.audiences", []value{{"web", []string{"alice", "bob"}}, {"api", []string{"bob", "carol"}}, {"w*", []string{"dave"}}}, true, carries},
	{"request.auth.presenter", []value{{"web-client", []string{"alice"}}, {"*", []string{"carol", "alice"}}}, true, carries},
	{"request.auth.claims[groups]", []value{{"admins", []string{"alice", "carol"}}, {"dev-*", []string{"bob"}}, {"*s", []string{"dave"}}, {"*", []string{"alice-elsewhere"}}}, true, carries},
	{"request.auth.claims[realm][roles]", []value{{"ops*", []string{"alice", "dave"}}, {"dev", []string{"bob"}}}, true, carries},
	{"request.auth.claims[realm][tier]", []value{{"gold", []string{"alice"}}, {"s*", []string{"bob"}}}, true, carries},
	{"request.auth.claims[realm][deep][er]", []value{{"yes", []string{"bob"}}}, true, carries},
	{"request.auth.claims[scope]", []value{{"read", []string{"bob"}}, {"admin", []string{"carol"}}, {"read write", []string{"bob"}}}, true, carries},
	{"request.auth.claims[level]", []value{{"7", []string{"alice"}}}, true, carries},
	{"request.auth.claims[vip]", []value{{"true", []string{"carol"}}}, true, carries},
	{"request.auth.claims[sub]", []value{{"alice", []string{"alice", "alice-elsewhere"}}}, true, carries},
	{"request.auth.claims[iss]", []value{{issuer, []string{"alice"}}, {"*.com", []string{"dave"}}}, true, carries},
}

// Tokens makes services with RequestAuthentication and policies about its claims, and requests with tokens of all sorts.
func Tokens(seed uint64, units int) (*Suite, error) {
	m := newMaker("tokens", seed)
	m.suite.File.Verdicts = true
	block, _ := pem.Decode(tokenKey)
	if block == nil {
		return nil, errors.New("token-key.pem holds no key")
	}
	key, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	signed := map[string]string{}
	for _, c := range claims {
		if signed[c.name], err = sign(key, c.object); err != nil {
			return nil, err
		}
	}
	signed["forged"] = signed["alice"][:len(signed["alice"])-8] + "AAAAAAAA"
	signed["garbage"] = "abc.def"
	keys, _ := json.Marshal(object{"keys": []object{{
		"kty": "RSA", "kid": "matrix", "alg": "RS256",
		"n": base64.RawURLEncoding.EncodeToString(key.N.Bytes()), "e": base64.RawURLEncoding.EncodeToString(big.NewInt(int64(key.E)).Bytes()),
	}}})
	m.suite.File.Tokens = signed
	for range units {
		u := m.unit("jwt", web, policedPorts...)
		first := object{"issuer": issuer, "jwks": string(keys)}
		if m.chance(40) {
			first["audiences"] = some(m, 1, 2, "web", "api")
		}
		if m.chance(40) {
			first["forwardOriginalToken"] = true
		}
		if m.chance(30) {
			first["spaceDelimitedClaims"] = []string{"groups"}
		}
		rules := []object{first}
		if m.chance(70) {
			other := object{"issuer": second, "jwks": string(keys)}
			switch m.IntN(4) {
			case 0:
				other["fromHeaders"] = []object{{"name": "x-token", "prefix": pick(m, "Token ", "")}}
			case 1:
				other["fromParams"] = []string{"token"}
			case 2:
				other["fromCookies"] = []string{"session"}
			}
			rules = append(rules, other)
		}
		u.add(object{
			"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": object{"name": u.Name, "namespace": "app"},
			"spec": object{"targetRefs": []object{{"kind": "Service", "group": "", "name": u.Name}}, "jwtRules": rules},
		})
		var meets [][]func(a *asked)
		for n := range 1 + m.IntN(2) {
			policy, more := m.policy(u, fmt.Sprintf("%s-%d", u.Name, n), tokenSources, operationFields, claimKeys)
			u.add(policy)
			meets = append(meets, more...)
		}
		m.carry(u, meets)
	}
	return m.finish()
}

// carry sends requests as ask does, with a token in one of the places where one may be.
func (m *maker) carry(u *Unit, meets [][]func(a *asked)) {
	var all []string
	for _, c := range claims {
		all = append(all, c.name)
	}
	all = append(all, "", "", "forged", "garbage")
	for range casesOfUnit {
		a := m.draw()
		a.token = pick(m, all...)
		if len(meets) > 0 && m.chance(75) {
			for _, meet := range pick(m, meets...) {
				if !m.chance(12) {
					meet(a)
				}
			}
		}
		c := m.write(u, a)
		if c.Protocol != "tcp" && a.token != "" {
			m.place(&c.Request, "{{"+a.token+"}}")
		}
		u.send("verdict", c)
	}
}

func (m *maker) place(r *golden.Request, token string) {
	switch m.IntN(12) {
	case 0, 1:
		r.Headers = append(r.Headers, "x-token: Token "+token)
	case 2:
		r.Headers = append(r.Headers, "x-token: "+token)
	case 3, 4:
		r.Path = m.withQuery(r.Path, "token", token)
	case 5, 6:
		r.Headers = append(r.Headers, "cookie: a=1; session="+token)
	case 7:
		r.Headers = append(r.Headers, "authorization: Bearer "+token, "x-token: Token {{dave}}")
	default:
		r.Headers = append(r.Headers, "authorization: Bearer "+token)
	}
}

// sign makes a token; RS256 signs the same every time.
func sign(key *rsa.PrivateKey, body object) (string, error) {
	header, _ := json.Marshal(object{"alg": "RS256", "typ": "JWT", "kid": "matrix"})
	text, err := json.Marshal(body)
	if err != nil {
		return "", err
	}
	signed := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(text)
	sum := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature), err
}
