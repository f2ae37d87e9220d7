//! The story for people.

use std::fmt;

use super::story::{ClusterTold, RouteTold, Step, StepOutcome, Story, Verdict};

impl fmt::Display for Story {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            request,
            snapshot: _,
            chain,
            steps,
            route,
            clusters,
            verdict,
            notes,
        } = self;
        writeln!(f, "{request}")?;
        if let Some(chain) = chain {
            writeln!(f, "  chain {chain}")?;
        }
        for step in steps {
            write!(f, "{step}")?;
        }
        if let Some(route) = route {
            write!(f, "{route}")?;
        }
        for cluster in clusters {
            writeln!(f, "  {cluster}")?;
        }
        for note in notes {
            writeln!(f, "  note: {note}")?;
        }
        writeln!(f, "{verdict}")
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match self.outcome {
            StepOutcome::Passes => "passes",
            StepOutcome::Denies => "DENIES",
            StepOutcome::Answers => "ANSWERS",
            StepOutcome::Off => "off",
            StepOutcome::Undecided => "undecided",
        };
        writeln!(f, "  filter {}: {outcome}", self.name)?;
        self.says.iter().try_for_each(|line| writeln!(f, "    {line}"))
    }
}

impl fmt::Display for RouteTold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            at,
            virtual_host,
            config,
            passed_over,
        } = self;
        match at {
            Some(at) => write!(f, "  route {} (#{at}", name.as_deref().unwrap_or("without a name"))?,
            None => write!(f, "  route none (")?,
        }
        match virtual_host {
            Some(host) => write!(f, " of virtual host {host})")?,
            None => write!(f, "no virtual host has the authority)")?,
        }
        if let Some(config) = config {
            write!(f, " from {config}")?;
        }
        writeln!(f)?;
        passed_over.iter().try_for_each(|line| writeln!(f, "    {line}"))
    }
}

impl fmt::Display for ClusterTold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, share, says } = self;
        write!(f, "cluster {name}: {says}")?;
        match share {
            Some(share) => write!(f, ", {share} requests"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            allowed,
            status,
            details,
            policy,
            because,
        } = self;
        f.write_str(match (allowed, status) {
            (true, None) => "ALLOWED",
            (true, Some(_)) => "ANSWERED",
            (false, _) => "DENIED",
        })?;
        if let Some(status) = status {
            write!(f, " {status}")?;
        }
        if let Some(details) = details {
            write!(f, " {details}")?;
        }
        if let Some(policy) = policy {
            write!(f, " by {policy}")?;
        }
        write!(f, ": {because}")
    }
}
