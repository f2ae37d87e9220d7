// Package matrix makes up configuration and requests that are aimed at it, both from a seed: the same seed gives
// the same suite on every machine. Configuration is Istio's and Gateway API's own objects, which a real istiod translates.
package matrix

import (
	_ "embed"
	"fmt"
	"math/rand/v2"
	"strings"

	"sigs.k8s.io/yaml"

	"oracle/golden"
)

//go:embed base.yaml
var base string

// Suite is a mesh and the requests that are sent into it.
type Suite struct {
	Name      string
	Seed      uint64
	Manifests string
	File      *golden.File
	Units     []*Unit
}

// Unit is one service, the objects that configure it, and its cases.
type Unit struct {
	Name    string
	Objects []string // YAML
	Cases   []golden.Case

	address string // of the service
}

// object is an Istio or Kubernetes object, or a part of one.
type object = map[string]any

// maker is what the making of one suite needs.
type maker struct {
	*rand.Rand
	suite *Suite
}

// Kinds are the suites that can be made.
var Kinds = map[string]func(seed uint64, units int) (*Suite, error){
	"traffic": Traffic, "authorization": Authorization, "tokens": Tokens,
}

func newMaker(name string, seed uint64) *maker {
	suite := &Suite{Name: name, Seed: seed, File: &golden.File{
		Scenario: name, Batch: true,
		Defaults: golden.Request{Authority: "web.app.svc.cluster.local"},
	}}
	return &maker{Rand: rand.New(rand.NewPCG(seed, uint64(len(name)))), suite: suite}
}

// finish joins the units.
func (m *maker) finish() (*Suite, error) {
	s := m.suite
	documents := []string{strings.TrimSpace(base)}
	for _, u := range s.Units {
		documents = append(documents, u.Objects...)
		s.File.Cases = append(s.File.Cases, u.Cases...)
	}
	s.Manifests = strings.Join(documents, "\n---\n") + "\n"
	if err := s.File.Complete(); err != nil {
		return nil, err
	}
	return s, nil
}

// unit begins a service of its own, with an address of its own.
func (m *maker) unit(kind string, selector object, ports ...object) *Unit {
	n := len(m.suite.Units)
	u := &Unit{Name: fmt.Sprintf("%s%02d", kind, n), address: fmt.Sprintf("10.96.%d.%d", 20+n/200, 1+n%200)}
	six := fmt.Sprintf("fd00:10:96::%x:%x", 20+n/200, 1+n%200)
	if len(ports) == 0 {
		ports = []object{{"name": "http", "port": 80, "targetPort": 8080}}
	}
	u.add(object{
		"apiVersion": "v1", "kind": "Service", "metadata": object{"name": u.Name, "namespace": "app"},
		"spec": object{"clusterIP": u.address, "clusterIPs": []string{u.address, six}, "ipFamilies": []string{"IPv4", "IPv6"}, "selector": selector, "ports": ports},
	})
	m.suite.Units = append(m.suite.Units, u)
	return u
}

func (u *Unit) add(o object) {
	text, err := yaml.Marshal(o)
	if err != nil {
		panic(fmt.Sprintf("an object of plain values: %v", err))
	}
	u.Objects = append(u.Objects, strings.TrimSpace(string(text)))
}

// host is the unit's service by its full name.
func (u *Unit) host() string { return u.Name + ".app.svc.cluster.local" }

// send adds a case.
func (u *Unit) send(kind string, c golden.Case) {
	c.Name = fmt.Sprintf("%s-%s-%d", u.Name, kind, len(u.Cases))
	if c.To == "" {
		c.To = u.address + ":80"
	}
	if c.Authority == "" {
		c.Authority = u.host()
	}
	u.Cases = append(u.Cases, c)
}

// Find returns the unit of a case.
func (s *Suite) Find(name string) (*Unit, *golden.Case) {
	for _, u := range s.Units {
		for i := range u.Cases {
			if u.Cases[i].Name == name {
				return u, &u.Cases[i]
			}
		}
	}
	return nil, nil
}

// pick takes one of several.
func pick[T any](m *maker, from ...T) T { return from[m.IntN(len(from))] }

// chance is true in percent of all times.
func (m *maker) chance(percent int) bool { return m.IntN(100) < percent }

// some takes between low and high of several, in their order.
func some[T any](m *maker, low, high int, from ...T) []T {
	n := low + m.IntN(high-low+1)
	chosen := map[int]bool{}
	for _, i := range m.Perm(len(from))[:min(n, len(from))] {
		chosen[i] = true
	}
	var out []T
	for i, x := range from {
		if chosen[i] {
			out = append(out, x)
		}
	}
	return out
}
