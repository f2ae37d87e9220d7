//! Which tokens a request must have, and whether it has them.
//!
//! The tree is walked as Envoy walks it: "any" ends with the first that holds, "all" with the first that does not, and what a good
//! token tells (headers, metadata) is told at once. Where nothing of "any" holds, the worst that was found counts: that a token is
//! missing, or another issuer's, says less than what is wrong with one. One thing is done otherwise: headers that only verified tokens may set are removed
//! for all issuers before the first is asked, so that no issuer that is not reached leaves a client's own word standing.

use std::sync::Arc;

use cairn_exchange::{DynamicMetadata, RequestHead};

use super::{
    keys::Keys,
    location::{Found, Locations},
    problem::Problem,
    provider::{KeySource, Provider, Verified, audience_accepted, places},
    token::Token,
};

/// What is required.
#[derive(Clone, Debug)]
pub enum Requirement {
    /// A good token of a provider, by its place among the providers.
    Provider {
        /// Which.
        provider: usize,
        /// Audiences instead of the provider's.
        audiences: Option<Vec<Box<str>>>,
    },
    /// One of these.
    Any(Vec<Requirement>),
    /// All of these.
    All(Vec<Requirement>),
    /// No token. Inside of "any": where the others look; elsewhere good tokens of all providers are looked for and told of.
    AllowMissing,
    /// The same, and bad ones.
    AllowMissingOrFailed,
    /// Nothing.
    Nothing,
}

/// A requirement with the places of its parts worked out.
#[derive(Debug)]
pub(super) enum Step {
    Provider {
        provider: usize,
        audiences: Option<Vec<Box<str>>>,
    },
    Any {
        steps: Vec<Step>,
        allow_missing: bool,
        allow_failed: bool,
    },
    All(Vec<Step>),
    Bypass {
        locations: Locations,
        allow_failed: bool,
    },
    Nothing,
}

/// Keys that were fetched, by the provider's place.
pub trait FetchedKeys {
    /// The keys, why there are none, or nothing if nobody has tried yet.
    fn keys(&self, provider: usize) -> Option<Result<Arc<Keys>, Problem>>;
}

/// Why a requirement does not hold, yet or at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unmet {
    Refused(Problem),
    /// The keys of this provider have to be fetched first.
    NeedsKeys(usize),
}

/// A walk over one request.
pub(super) struct Walk<'a> {
    pub(super) providers: &'a [Provider],
    pub(super) fetched: &'a dyn FetchedKeys,
    /// Seconds since 1970.
    pub(super) now: u64,
    pub(super) head: &'a mut RequestHead,
    pub(super) metadata: &'a mut DynamicMetadata,
}

// === impl Step ===

impl Step {
    /// Works out the places; `None` if a provider is not there.
    pub(super) fn compile(requirement: Requirement, providers: &[Provider]) -> Option<Self> {
        let each = |list: Vec<Requirement>| {
            let steps = list.into_iter().map(|one| Self::compile(one, providers));
            steps.collect::<Option<Vec<_>>>()
        };
        let bypass = |allow_failed| {
            let mut locations = Locations::default();
            for provider in providers {
                locations.add(provider.settings.issuer.as_deref(), &places(&provider.settings));
            }
            Self::Bypass { locations, allow_failed }
        };
        Some(match requirement {
            Requirement::Provider { provider, .. } if provider >= providers.len() => return None,
            Requirement::Provider { provider, audiences } => Self::Provider { provider, audiences },
            Requirement::All(all) => Self::All(each(all)?),
            Requirement::Any(any) => {
                let count = any.len();
                let allow_missing = any.iter().any(|one| matches!(one, Requirement::AllowMissing));
                let allow_failed = any.iter().any(|one| matches!(one, Requirement::AllowMissingOrFailed));
                let is_bypass = |one: &Requirement| matches!(one, Requirement::AllowMissing | Requirement::AllowMissingOrFailed);
                let others: Vec<_> = any.into_iter().filter(|one| !is_bypass(one)).collect();
                if others.is_empty() && count > 0 {
                    return Some(bypass(allow_failed));
                }
                Self::Any {
                    steps: each(others)?,
                    allow_missing,
                    allow_failed,
                }
            }
            Requirement::AllowMissing => bypass(false),
            Requirement::AllowMissingOrFailed => bypass(true),
            Requirement::Nothing => Self::Nothing,
        })
    }
}

// === impl Walk ===

impl Walk<'_> {
    pub(super) fn check(&mut self, step: &Step) -> Result<(), Unmet> {
        match step {
            Step::Nothing => Ok(()),
            Step::All(all) => all.iter().try_for_each(|one| self.check(one)),
            Step::Any {
                steps,
                allow_missing,
                allow_failed,
            } => {
                let mut worst = Problem::Missing;
                for one in steps {
                    match self.check(one) {
                        Ok(()) => return Ok(()),
                        Err(Unmet::Refused(Problem::Missing | Problem::UnknownIssuer)) if worst != Problem::Missing => {}
                        Err(Unmet::Refused(problem)) => worst = problem,
                        needs @ Err(Unmet::NeedsKeys(_)) => return needs,
                    }
                }
                if *allow_failed || (*allow_missing && worst == Problem::Missing) {
                    return Ok(());
                }
                Err(Unmet::Refused(worst))
            }
            Step::Provider { provider, audiences } => {
                let index = *provider;
                // Compiling has checked that it is there.
                let Some(provider) = self.providers.get(index) else {
                    return Err(Unmet::Refused(Problem::UnknownIssuer));
                };
                let found = provider.locations.find(self.head);
                let mut result = Err(Unmet::Refused(Problem::Missing));
                for found in found.into_iter().rev() {
                    result = self.one(&found, Some(index), audiences.as_deref());
                    // All tokens must be good: whoever reads the request behind us may take any of them.
                    if result.is_err() {
                        break;
                    }
                }
                if let Err(Unmet::Refused(problem)) = result {
                    provider.tell_failure(problem, self.metadata);
                }
                result
            }
            Step::Bypass { locations, allow_failed } => {
                // As with Envoy, what the last token is, decides.
                let mut result = Ok(());
                for found in locations.find(self.head).into_iter().rev() {
                    result = self.one(&found, None, None);
                    if let Err(Unmet::NeedsKeys(_)) = result {
                        return result;
                    }
                }
                if *allow_failed { Ok(()) } else { result }
            }
        }
    }

    /// One token, of a provider or of whichever has its issuer.
    pub(super) fn one(
        &mut self,
        found: &Found<'_>,
        provider: Option<usize>,
        audiences: Option<&[Box<str>]>,
    ) -> Result<(), Unmet> {
        let providers = self.providers;
        let named = provider.and_then(|index| providers.get(index));
        let known = named.and_then(|provider| provider.verified.get(&*found.text));
        let mut parsed = None;
        let token = match &known {
            Some(known) => &known.token,
            None => parsed.insert(Token::parse(&found.text).map_err(Unmet::Refused)?),
        };
        if !found.location.is_for(&token.issuer) {
            return Err(Unmet::Refused(Problem::UnknownIssuer));
        }
        let index = match provider {
            Some(index) => index,
            None => self.of_issuer(&token.issuer).ok_or(Unmet::Refused(Problem::UnknownIssuer))?,
        };
        let Some(provider) = providers.get(index) else {
            return Err(Unmet::Refused(Problem::UnknownIssuer));
        };
        if let Err(problem) = token.check_time(self.now, provider.skew()) {
            provider.verified.remove(&*found.text);
            return Err(Unmet::Refused(problem));
        }
        if !audience_accepted(audiences.unwrap_or(&provider.settings.audiences), &token.audiences) {
            return Err(Unmet::Refused(Problem::Audience));
        }
        let verified = match (known, parsed) {
            (Some(known), _) => known,
            (None, None) => return Err(Unmet::Refused(Problem::Signature)),
            (None, Some(token)) => {
                self.verify(index, provider, &token)?;
                let verified = Arc::new(provider.verified(token));
                if named.is_some() {
                    provider.verified.insert(found.text.as_str().into(), verified.clone());
                }
                verified
            }
        };
        provider.tell(&verified, found.location, self.head, self.metadata);
        Ok(())
    }

    fn verify(&self, index: usize, provider: &Provider, token: &Token) -> Result<(), Unmet> {
        let verified = match &provider.keys {
            KeySource::Inline(Ok(keys)) => keys.verify(token),
            // Keys that nobody can read are no keys.
            KeySource::Inline(Err(_)) => Err(Problem::NoValidKeys),
            KeySource::Remote => match self.fetched.keys(index) {
                None => return Err(Unmet::NeedsKeys(index)),
                Some(keys) => keys.and_then(|keys| keys.verify(token)),
            },
        };
        verified.map_err(Unmet::Refused)
    }

    /// The first provider of an issuer, else the first of any.
    fn of_issuer(&self, issuer: &str) -> Option<usize> {
        let own = |wanted: Option<&str>| {
            let is = move |provider: &Provider| provider.settings.issuer.as_deref() == wanted;
            self.providers.iter().position(is)
        };
        own(Some(issuer)).or_else(|| own(None))
    }
}

impl Verified {
    /// For tests of what is remembered.
    #[cfg(test)]
    pub(super) fn issuer(&self) -> &str {
        &self.token.issuer
    }
}
