//! A token, taken apart but not believed yet (RFC 7515, RFC 7519).

use std::sync::Arc;

use base64::{
    Engine,
    alphabet::URL_SAFE,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde_json::{Map, Value};

use super::{json, problem::Problem};

/// Longest token that is looked at, in bytes; heads of requests have limits of their own.
pub const MAX_TOKEN: usize = 64 * 1024;

/// Base64url as tokens and keys have it: padding or none, and nobody looks at the bits that belong to no byte.
pub(super) const BASE64URL: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Signature algorithms (RFC 7518 §3.1, RFC 8037).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "names of the RFC")]
pub enum Algorithm {
    ES256,
    ES384,
    ES512,
    HS256,
    HS384,
    HS512,
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    EdDSA,
}

/// A token.
#[derive(Debug)]
pub struct Token {
    pub(super) text: Box<str>,
    pub(super) algorithm: Algorithm,
    pub(super) key_id: Option<Box<str>>,
    pub(super) header: Arc<Value>,
    pub(super) claims: Arc<Value>,
    pub(super) issuer: Box<str>,
    pub(super) audiences: Vec<Box<str>>,
    not_before: Option<u64>,
    expires: Option<u64>,
    signature: Vec<u8>,
    /// Where the payload begins and ends in `text`.
    payload: (usize, usize),
}

// === impl Algorithm ===

impl Algorithm {
    /// By its name in `alg`.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "ES256" => Self::ES256,
            "ES384" => Self::ES384,
            "ES512" => Self::ES512,
            "HS256" => Self::HS256,
            "HS384" => Self::HS384,
            "HS512" => Self::HS512,
            "RS256" => Self::RS256,
            "RS384" => Self::RS384,
            "RS512" => Self::RS512,
            "PS256" => Self::PS256,
            "PS384" => Self::PS384,
            "PS512" => Self::PS512,
            "EdDSA" => Self::EdDSA,
            _ => return None,
        })
    }
}

// === impl Token ===

impl Token {
    /// Takes a token apart.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        if text.len() > MAX_TOKEN {
            return Err(Problem::Form);
        }
        let mut parts = text.split('.');
        let (Some(head), Some(payload), Some(signature), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err(Problem::Form);
        };
        if head.is_empty() || payload.is_empty() || signature.is_empty() {
            return Err(Problem::Form);
        }
        let at = (head.len() + 1, head.len() + 1 + payload.len());
        let header = BASE64URL.decode(head).map_err(|_| Problem::HeaderEncoding)?;
        let header = json::object(&header).ok_or(Problem::HeaderJson)?;
        let algorithm = header.get("alg").and_then(Value::as_str).ok_or(Problem::NoAlgorithm)?;
        let algorithm = Algorithm::named(algorithm).ok_or(Problem::Algorithm)?;
        let key_id = match header.get("kid") {
            None => None,
            Some(Value::String(kid)) if kid.is_empty() => None,
            Some(Value::String(kid)) => Some(kid.as_str().into()),
            Some(_) => return Err(Problem::KeyId),
        };
        if header.contains_key("crit") {
            return Err(Problem::Critical);
        }
        let claims = BASE64URL.decode(payload).map_err(|_| Problem::PayloadEncoding)?;
        let claims = json::object(&claims).ok_or(Problem::PayloadJson)?;
        let issuer = text_claim(&claims, "iss")?.unwrap_or_default().into();
        text_claim(&claims, "sub")?;
        time_claim(&claims, "iat")?;
        let not_before = time_claim(&claims, "nbf")?;
        let expires = time_claim(&claims, "exp")?;
        text_claim(&claims, "jti")?;
        let audiences = audiences(&claims)?;
        let signature = BASE64URL.decode(signature).map_err(|_| Problem::SignatureEncoding)?;
        Ok(Self {
            text: text.into(),
            algorithm,
            key_id,
            header: Arc::new(Value::Object(header)),
            claims: Arc::new(Value::Object(claims)),
            issuer,
            audiences,
            not_before,
            expires,
            signature,
            payload: at,
        })
    }

    /// Whether it is time for it: `now` in seconds since 1970, with a tolerance for clocks that differ.
    pub fn check_time(&self, now: u64, skew: u64) -> Result<(), Problem> {
        if self
            .not_before
            .is_some_and(|not_before| now.saturating_add(skew) < not_before)
        {
            return Err(Problem::NotYetValid);
        }
        if self.expires.is_some_and(|expires| now > expires.saturating_add(skew)) {
            return Err(Problem::Expired);
        }
        Ok(())
    }

    /// The payload as it stands in the token.
    pub fn payload(&self) -> &str {
        self.text.get(self.payload.0..self.payload.1).unwrap_or_default()
    }

    /// What was signed.
    pub(super) fn signed(&self) -> &[u8] {
        self.text.as_bytes().get(..self.payload.1).unwrap_or_default()
    }

    pub(super) fn signature(&self) -> &[u8] {
        &self.signature
    }
}

fn text_claim<'a>(claims: &'a Map<String, Value>, claim: &'static str) -> Result<Option<&'a str>, Problem> {
    let wanted = "a string";
    claims
        .get(claim)
        .map(|value| value.as_str().ok_or(Problem::Claim { claim, wanted }))
        .transpose()
}

/// A number of seconds; fractions are cut off.
fn time_claim(claims: &Map<String, Value>, claim: &'static str) -> Result<Option<u64>, Problem> {
    let Some(value) = claims.get(claim) else { return Ok(None) };
    let wanted = "an integer";
    let number = value.as_f64().ok_or(Problem::Claim { claim, wanted })?;
    #[expect(clippy::cast_precision_loss, reason = "only a bound")]
    let most = u64::MAX as f64;
    if !(0.0..most).contains(&number) {
        let wanted = "a positive 64 bit integer";
        return Err(Problem::Claim { claim, wanted });
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above")]
    let seconds = value.as_u64().unwrap_or(number as u64);
    Ok(Some(seconds))
}

fn audiences(claims: &Map<String, Value>) -> Result<Vec<Box<str>>, Problem> {
    let problem = Problem::Claim {
        claim: "aud",
        wanted: "a string or string list",
    };
    match claims.get("aud") {
        None => Ok(Vec::new()),
        Some(Value::String(one)) => Ok(vec![one.as_str().into()]),
        Some(Value::Array(several)) => {
            let texts = several.iter().map(|item| item.as_str().map(Into::into).ok_or(problem));
            texts.collect()
        }
        Some(_) => Err(problem),
    }
}

/// The claims with those of the given names as lists of their words, since policies match words: `"scope": "read write"`.
pub(super) fn with_words(claims: &Arc<Value>, names: &[Box<str>]) -> Arc<Value> {
    let mut edited = claims.clone();
    for name in names {
        if let Some(text) = claims.get(&**name).and_then(Value::as_str) {
            let words = text.split(' ').filter(|word| !word.is_empty()).map(Value::from).collect();
            if let Some(claim) = Arc::make_mut(&mut edited).get_mut(&**name) {
                *claim = words;
            }
        }
    }
    edited
}
