package main

import (
	"errors"
	"strings"

	"oracle/live"
)

// runLive holds the proxy against a real istiod.
func runLive(args []string) error {
	set, p := flags("live")
	lab := set.String("lab", "", "the istiod-lab binary")
	changes := set.Int("changes", 300, "how many live changes under load")
	steps := set.String("step", "", "comma-separated steps (default: all): "+strings.Join(live.Names(), ", "))
	set.StringVar(&p.runner.Command, "proxy-cmd", "", "shell command that runs the proxy under test (default: Envoy, behind a relay)")
	set.Parse(args)
	if *lab == "" {
		return errors.New("--lab is required: build conformance/istiod-lab")
	}
	o := live.Options{Lab: *lab, Runner: p.runner, Changes: *changes}
	if *steps != "" {
		o.Steps = strings.Split(*steps, ",")
	}
	return live.Run(o)
}
