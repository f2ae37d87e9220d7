// Package control plays istiod and the certificate agent for the proxy under test.
package control

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// CertificateAuthority is one root with its issued certificates.
type CertificateAuthority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	PEM         []byte

	mu     sync.Mutex
	issued map[string]*tls.Certificate
}

// NewAuthority makes a root.
func NewAuthority(name string) (*CertificateAuthority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name, Organization: []string{"oracle"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &CertificateAuthority{certificate: certificate, key: key, PEM: pemBlock("CERTIFICATE", der), issued: map[string]*tls.Certificate{}}, nil
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// KeyPEM is the root's private key, for a control plane that signs with the same root.
func (c *CertificateAuthority) KeyPEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(c.key)
	return pemBlock("PRIVATE KEY", der), err
}

// Pool trusts this root only.
func (c *CertificateAuthority) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(c.certificate)
	return pool
}

// Names are the subject alternative names of a certificate.
type Names struct {
	URI string
	DNS []string
	IP  []net.IP
}

func (c *CertificateAuthority) sign(n Names, public any, life time.Duration) ([]byte, error) {
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	template := &x509.Certificate{
		SerialNumber: serial, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames: n.DNS, IPAddresses: n.IP,
	}
	if n.URI != "" {
		uri, err := url.Parse(n.URI)
		if err != nil {
			return nil, err
		}
		template.URIs = []*url.URL{uri}
	} else if len(n.DNS) > 0 {
		template.Subject = pkix.Name{CommonName: n.DNS[0]}
	}
	return x509.CreateCertificate(rand.Reader, template, c.certificate, public, c.key)
}

// Issue returns a certificate with a fresh key, the same one for the same names.
func (c *CertificateAuthority) Issue(n Names) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	name := fmt.Sprint(n)
	if done := c.issued[name]; done != nil {
		return done, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := c.sign(n, &key.PublicKey, 24*time.Hour)
	if err != nil {
		return nil, err
	}
	c.issued[name] = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return c.issued[name], nil
}

// PEMPair encodes a certificate and its key.
func PEMPair(c *tls.Certificate) (certificate, key []byte, err error) {
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	return pemBlock("CERTIFICATE", c.Certificate[0]), pemBlock("PRIVATE KEY", der), err
}

// Authorities are the mesh root, and a second root for everything outside the mesh.
type Authorities struct{ Mesh, Outside *CertificateAuthority }

// NewAuthorities makes both roots.
func NewAuthorities() (*Authorities, error) {
	mesh, err := NewAuthority("mesh root")
	if err != nil {
		return nil, err
	}
	outside, err := NewAuthority("outside root")
	return &Authorities{mesh, outside}, err
}

// Workload issues the certificate of a SPIFFE identity.
func (a *Authorities) Workload(spiffe string) (*tls.Certificate, error) {
	return a.Mesh.Issue(Names{URI: spiffe})
}

// External issues a server certificate outside the mesh, for a DNS name or an address.
func (a *Authorities) External(name string) (*tls.Certificate, error) {
	if ip := net.ParseIP(name); ip != nil {
		return a.Outside.Issue(Names{IP: []net.IP{ip}})
	}
	return a.Outside.Issue(Names{DNS: []string{name}})
}

// MeshRoots is the mesh's trust bundle.
func (a *Authorities) MeshRoots() *x509.CertPool { return a.Mesh.Pool() }

// WriteFiles leaves root-cert.pem, cert-chain.pem and key.pem for a proxy that reads files.
func (a *Authorities) WriteFiles(dir, spiffe string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	issued, err := a.Workload(spiffe)
	if err != nil {
		return err
	}
	certificate, key, err := PEMPair(issued)
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{
		"root-cert.pem": a.Mesh.PEM, "cert-chain.pem": certificate, "key.pem": key, "outside-root.pem": a.Outside.PEM,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}
