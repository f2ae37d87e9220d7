package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"istio.io/istio/pkg/security"
	"istio.io/istio/pkg/spiffe"
	"istio.io/istio/pkg/test"
	"istio.io/istio/security/pkg/pki/ca"
	caserver "istio.io/istio/security/pkg/server/ca"
	"istio.io/istio/security/pkg/server/ca/authenticate"
)

const istiodHost = "istiod.istio-system.svc"

// tokenReader accepts every bearer JWT and believes its subject without
// checking the signature. Only a lab may do that.
type tokenReader struct{ trustDomain string }

var _ security.Authenticator = tokenReader{}

func (tokenReader) AuthenticatorType() string { return "lab-token" }

func (a tokenReader) Authenticate(ctx security.AuthContext) (*security.Caller, error) {
	if ctx.GrpcContext == nil {
		return nil, fmt.Errorf("only gRPC callers carry tokens")
	}
	token, err := security.ExtractBearerToken(ctx.GrpcContext)
	if err != nil {
		return nil, err
	}
	namespace, account, err := tokenSubject(token)
	if err != nil {
		return nil, err
	}
	identity := spiffe.Identity{TrustDomain: a.trustDomain, Namespace: namespace, ServiceAccount: account}
	return &security.Caller{
		AuthSource:     security.AuthSourceIDToken,
		Identities:     []string{identity.String()},
		KubernetesInfo: security.KubernetesInfo{PodNamespace: namespace, PodServiceAccount: account},
	}, nil
}

// tokenSubject reads system:serviceaccount:NAMESPACE:NAME from a JWT's payload.
func tokenSubject(token string) (namespace, account string, err error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "", "", fmt.Errorf("not a JWT")
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(parts[1], "="))
	if err != nil {
		return "", "", err
	}
	var claims struct {
		Subject string `json:"sub"`
	}
	if err := json.Unmarshal(payload, &claims); err != nil {
		return "", "", err
	}
	subject := strings.Split(claims.Subject, ":")
	if len(subject) != 4 || subject[0] != "system" || subject[1] != "serviceaccount" {
		return "", "", fmt.Errorf("subject %q is not a service account", claims.Subject)
	}
	return subject[2], subject[3], nil
}

// unsignedToken is a JWT that only tokenReader accepts.
func unsignedToken(namespace, account string) string {
	payload, _ := json.Marshal(map[string]any{"sub": "system:serviceaccount:" + namespace + ":" + account, "aud": []string{"istio-ca"}})
	header := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"JWT"}`))
	return header + "." + base64.RawURLEncoding.EncodeToString(payload) + "."
}

// serveTLS offers xDS and Istio's own CA service over TLS and returns the address.
func serveTLS(t test.Failer, l *lab, opts serveOptions) (string, error) {
	caOptions, err := signingOptions(opts, l.mesh.TrustDomain)
	if err != nil {
		return "", err
	}
	authority, err := ca.NewIstioCA(caOptions)
	if err != nil {
		return "", err
	}
	root := authority.GetCAKeyCertBundle().GetRootCertPem()
	if err := os.WriteFile(opts.rootCert, root, 0o644); err != nil {
		return "", err
	}
	certificate, err := serverCertificate(authority)
	if err != nil {
		return "", err
	}
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM(root)

	authenticators := []security.Authenticator{&authenticate.ClientCertAuthenticator{}, tokenReader{l.mesh.TrustDomain}}
	l.server.Discovery.Authenticators = authenticators
	caService, err := caserver.New(authority, opts.certTTL, authenticators, nil)
	if err != nil {
		return "", err
	}
	listener, err := net.Listen("tcp", opts.tlsListen)
	if err != nil {
		return "", err
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{certificate},
		ClientAuth:   tls.VerifyClientCertIfGiven,
		ClientCAs:    clients,
		MinVersion:   tls.VersionTLS12,
	})))
	l.server.Discovery.Register(server)
	caService.Register(server)
	t.Cleanup(server.Stop)
	go func() { _ = server.Serve(listener) }()
	return listener.Addr().String(), nil
}

// signingOptions takes the root from files, so that it outlives a restart as istiod's does in its Secret,
// or makes one for the life of the process.
func signingOptions(opts serveOptions, trustDomain string) (*ca.IstioCAOptions, error) {
	const maxTTL, rsaBits = 10 * 365 * 24 * time.Hour, 2048
	if opts.caCert == "" {
		return ca.NewSelfSignedDebugIstioCAOptions("", maxTTL, opts.certTTL, maxTTL, trustDomain, rsaBits)
	}
	return ca.NewPluggedCertIstioCAOptions(ca.SigningCAFileBundle{
		RootCertFile: opts.caCert, SigningCertFile: opts.caCert, SigningKeyFile: opts.caKey,
	}, opts.certTTL, maxTTL, rsaBits)
}

func serverCertificate(authority *ca.IstioCA) (tls.Certificate, error) {
	names := []string{istiodHost, "istiod.istio-system", "istiod", "localhost", "127.0.0.1"}
	certPEM, keyPEM, err := authority.GenKeyCert(names, 365*24*time.Hour, false)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(certPEM, keyPEM)
}
