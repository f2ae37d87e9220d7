//! Why a request's tokens are accepted or not: which providers were asked, what each of them found, and what is wrong with it.
//!
//! The verdict is [`Authentication::check`]'s own, on the request that is handed in. Of a token its issuer, audiences and times are
//! told, never the token itself.

use cairn_exchange::{DynamicMetadata, RequestHead};

use super::{
    Authentication, Checked, FetchedKeys, PerRoute, Place, Problem, Token,
    provider::places,
    requirement::{Step, Unmet, Walk},
};
use crate::route::Facts;

/// Tokens of a request that are told of, for each provider.
const MOST_TOKENS: usize = 4;

/// The story of a filter that asks for tokens.
#[derive(Clone, Debug)]
pub struct JwtStory {
    /// What is required, in words; nothing where no rule asks for a token.
    pub requires: Option<String>,
    /// Providers that the requirement names, with what they say.
    pub providers: Vec<ProviderStory>,
    /// The verdict.
    pub checked: Checked,
}

/// What one provider says.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ProviderStory {
    /// Its name in the configuration.
    pub name: String,
    /// Whose tokens it takes.
    pub issuer: Option<String>,
    /// Where it looks.
    pub places: Vec<String>,
    /// The tokens that it found.
    pub tokens: Vec<TokenStory>,
}

/// What is said of one token.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TokenStory {
    /// What it says of itself: issuer, audiences, expiry.
    pub about: String,
    /// Why it is not accepted; nothing where it is.
    pub problem: Option<String>,
}

impl Authentication {
    /// Decides as [`Authentication::check`], on the same request, and tells why.
    pub fn explain(
        &self,
        per_route: Option<&PerRoute>,
        head: &mut RequestHead,
        metadata: &mut DynamicMetadata,
        random: u64,
        now: u64,
        fetched: &dyn FetchedKeys,
    ) -> JwtStory {
        let step = match per_route {
            Some(PerRoute::Disabled) => None,
            Some(PerRoute::Requirement(wanted)) => self.named.iter().find(|(name, _)| name == wanted).map(|(_, step)| step),
            None => {
                let matching = |rule: &&super::Rule| rule.matches.matches(head, Facts { random, metadata });
                self.rules.iter().find(matching).map(|rule| &rule.requires)
            }
        };
        let step = step.filter(|_| !(self.bypass_cors_preflight && super::is_cors_preflight(head)));
        let mut named = Vec::new();
        if let Some(step) = step {
            providers(step, &mut named);
        }
        let stories = named
            .into_iter()
            .map(|(index, audiences)| self.provider(index, audiences, head, metadata, now, fetched));
        let stories = stories.collect();
        JwtStory {
            requires: step.map(|step| self.words(step)),
            providers: stories,
            checked: self.check(per_route, head, metadata, random, now, fetched),
        }
    }

    fn provider(
        &self,
        index: usize,
        audiences: Option<&[Box<str>]>,
        head: &RequestHead,
        metadata: &DynamicMetadata,
        now: u64,
        fetched: &dyn FetchedKeys,
    ) -> ProviderStory {
        let Some(provider) = self.providers.get(index) else {
            return ProviderStory {
                name: "?".to_owned(),
                issuer: None,
                places: Vec::new(),
                tokens: Vec::new(),
            };
        };
        let settings = &provider.settings;
        let found = provider.locations.find(head);
        let tokens = found.iter().take(MOST_TOKENS).map(|found| {
            let (mut head, mut metadata) = (head.clone(), metadata.clone());
            let mut walk = Walk {
                providers: &self.providers,
                fetched,
                now,
                head: &mut head,
                metadata: &mut metadata,
            };
            let problem = match walk.one(found, Some(index), audiences) {
                Ok(()) => None,
                Err(Unmet::NeedsKeys(_)) => Some("the issuer's keys have not been fetched here".to_owned()),
                Err(Unmet::Refused(problem)) => {
                    let wanted = audiences.unwrap_or(&settings.audiences);
                    Some(because(problem, settings.issuer.as_deref(), wanted))
                }
            };
            TokenStory {
                about: about(&found.text),
                problem,
            }
        });
        ProviderStory {
            name: settings.name.to_string(),
            issuer: settings.issuer.as_deref().map(str::to_owned),
            places: places(settings).iter().map(place).collect(),
            tokens: tokens.collect(),
        }
    }

    fn words(&self, step: &Step) -> String {
        let join = |steps: &[Step], word: &str| {
            let all: Vec<_> = steps.iter().map(|one| self.words(one)).collect();
            match &*all {
                [one] => one.clone(),
                all => format!("({})", all.join(word)),
            }
        };
        match step {
            Step::Provider { provider, .. } => {
                let name = self.providers.get(*provider).map_or("?", |provider| &*provider.settings.name);
                format!("a good token of {name}")
            }
            Step::Any {
                steps,
                allow_missing,
                allow_failed,
            } => {
                let any = join(steps, " or ");
                match (allow_failed, allow_missing) {
                    (true, _) => format!("({any} or anything)"),
                    (false, true) => format!("({any} or no token)"),
                    (false, false) => any,
                }
            }
            Step::All(all) => join(all, " and "),
            Step::Bypass { allow_failed: false, .. } => "no token".to_owned(),
            Step::Bypass { allow_failed: true, .. } => "anything".to_owned(),
            Step::Nothing => "nothing".to_owned(),
        }
    }
}

/// The providers of a requirement, each once.
fn providers<'a>(step: &'a Step, into: &mut Vec<(usize, Option<&'a [Box<str>]>)>) {
    match step {
        Step::Provider { provider, audiences } => {
            if !into.iter().any(|(known, _)| known == provider) {
                into.push((*provider, audiences.as_deref()));
            }
        }
        Step::Any { steps, .. } | Step::All(steps) => steps.iter().for_each(|one| providers(one, into)),
        Step::Bypass { .. } | Step::Nothing => {}
    }
}

fn place(place: &Place) -> String {
    match place {
        Place::Header { name, prefix } if prefix.is_empty() => format!("header {name}"),
        Place::Header { name, prefix } => format!("header {name} ({})", prefix.trim_end()),
        Place::Parameter(name) => format!("parameter {name}"),
        Place::Cookie(name) => format!("cookie {name}"),
    }
}

/// What a token says of itself.
fn about(text: &str) -> String {
    let Ok(token) = Token::parse(text) else {
        return "an unreadable token".to_owned();
    };
    let issuer = if token.issuer.is_empty() { "nobody" } else { &token.issuer };
    let audiences = if token.audiences.is_empty() {
        String::new()
    } else {
        format!(" for {}", token.audiences.join(", "))
    };
    let expires = token
        .claims
        .get("exp")
        .map(|at| format!(", expires at {at}"))
        .unwrap_or_default();
    format!("a token of {issuer}{audiences}{expires}")
}

fn because(problem: Problem, issuer: Option<&str>, audiences: &[Box<str>]) -> String {
    match problem {
        Problem::UnknownIssuer => match issuer {
            Some(issuer) => format!("{problem}: {issuer} is wanted"),
            None => problem.to_string(),
        },
        Problem::Audience => format!("{problem}: {} is wanted", audiences.join(" or ")),
        problem => problem.to_string(),
    }
}
