//! The keys of an issuer (RFC 7517), and signatures made with them.
//!
//! A key verifies only algorithms of its own kind, so that a public key is never taken for a shared secret. Keys that cannot be used
//! (unknown kinds, RSA below 2,048 bits) are left out, as Envoy leaves out what it does not know; the others serve.

use aws_lc_rs::{
    hmac,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, ED25519, ParsedPublicKey,
        RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256,
        RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512, RsaPublicKeyComponents, VerificationAlgorithm,
    },
};
use base64::Engine;
use serde_json::{Map, Value};

use super::{
    problem::Problem,
    token::{Algorithm, BASE64URL, Token},
};

/// A set of keys.
#[derive(Debug)]
pub struct Keys {
    keys: Vec<Key>,
}

#[derive(Debug)]
struct Key {
    id: Option<Box<str>>,
    /// The only algorithm that it is for, if it says so.
    algorithm: Option<Box<str>>,
    material: Material,
}

enum Material {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    Elliptic { curve: Algorithm, key: ParsedPublicKey },
    Edwards(ParsedPublicKey),
    Secret(Vec<u8>),
}

/// Fewest bytes of an RSA modulus that is accepted: 2,048 bits.
const MIN_MODULUS: usize = 256;

// === impl Keys ===

impl Keys {
    /// Parses a JSON Web Key Set.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        let set: Value = serde_json::from_str(text).map_err(|_| Problem::KeysJson)?;
        let listed = set
            .as_object()
            .ok_or(Problem::KeysJson)?
            .get("keys")
            .ok_or(Problem::NoKeysField)?;
        let listed = listed.as_array().ok_or(Problem::KeysNotArray)?;
        let keys: Vec<_> = listed.iter().filter_map(|key| Key::parse(key.as_object()?)).collect();
        if keys.is_empty() {
            return Err(Problem::NoValidKeys);
        }
        Ok(Self { keys })
    }

    /// Whether one of the keys made the token's signature.
    pub fn verify(&self, token: &Token) -> Result<(), Problem> {
        let mut matched = false;
        for key in &self.keys {
            if !key.is_for(token) {
                continue;
            }
            matched = true;
            if key.material.verifies(token) {
                return Ok(());
            }
        }
        Err(if matched { Problem::Signature } else { Problem::NoMatchingKey })
    }
}

// === impl Key ===

impl Key {
    fn parse(key: &Map<String, Value>) -> Option<Self> {
        let text = |name: &str| key.get(name).and_then(Value::as_str);
        let bytes = |name: &str| BASE64URL.decode(text(name)?).ok();
        let material = match text("kty")? {
            "RSA" => {
                let (n, e) = (unsigned(bytes("n")?), unsigned(bytes("e")?));
                (n.len() >= MIN_MODULUS && !e.is_empty()).then_some(Material::Rsa { n, e })?
            }
            "EC" => {
                let (curve, size, algorithm): (_, _, &'static dyn VerificationAlgorithm) = match text("crv")? {
                    "P-256" => (Algorithm::ES256, 32, &ECDSA_P256_SHA256_FIXED),
                    "P-384" => (Algorithm::ES384, 48, &ECDSA_P384_SHA384_FIXED),
                    "P-521" => (Algorithm::ES512, 66, &ECDSA_P521_SHA512_FIXED),
                    _ => return None,
                };
                let mut point = vec![4];
                point.extend(padded(bytes("x")?, size)?);
                point.extend(padded(bytes("y")?, size)?);
                let key = ParsedPublicKey::new(algorithm, point).ok()?;
                Material::Elliptic { curve, key }
            }
            "OKP" if text("crv")? == "Ed25519" => Material::Edwards(ParsedPublicKey::new(&ED25519, bytes("x")?).ok()?),
            "oct" => Material::Secret(bytes("k").filter(|secret| !secret.is_empty())?),
            _ => return None,
        };
        let own = |name| text(name).filter(|text| !text.is_empty()).map(Into::into);
        Some(Self {
            id: own("kid"),
            algorithm: own("alg"),
            material,
        })
    }

    fn is_for(&self, token: &Token) -> bool {
        let id = match (&self.id, &token.key_id) {
            (Some(own), Some(wanted)) => own == wanted,
            _ => true,
        };
        id && self
            .algorithm
            .as_ref()
            .is_none_or(|own| Algorithm::named(own) == Some(token.algorithm))
    }
}

/// A big-endian number without the zeros before it.
fn unsigned(mut bytes: Vec<u8>) -> Vec<u8> {
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    bytes.drain(..zeros);
    bytes
}

/// A coordinate in its curve's size.
fn padded(bytes: Vec<u8>, size: usize) -> Option<Vec<u8>> {
    let bytes = unsigned(bytes);
    let mut padded = vec![0; size.checked_sub(bytes.len())?];
    padded.extend(bytes);
    Some(padded)
}

// === impl Material ===

impl Material {
    fn verifies(&self, token: &Token) -> bool {
        let (signed, signature) = (token.signed(), token.signature());
        match (self, token.algorithm) {
            (Self::Rsa { n, e }, algorithm) => {
                let algorithm = match algorithm {
                    Algorithm::RS256 => &RSA_PKCS1_2048_8192_SHA256,
                    Algorithm::RS384 => &RSA_PKCS1_2048_8192_SHA384,
                    Algorithm::RS512 => &RSA_PKCS1_2048_8192_SHA512,
                    Algorithm::PS256 => &RSA_PSS_2048_8192_SHA256,
                    Algorithm::PS384 => &RSA_PSS_2048_8192_SHA384,
                    Algorithm::PS512 => &RSA_PSS_2048_8192_SHA512,
                    _ => return false,
                };
                RsaPublicKeyComponents { n, e }.verify(algorithm, signed, signature).is_ok()
            }
            (Self::Elliptic { curve, key }, algorithm) => *curve == algorithm && key.verify_sig(signed, signature).is_ok(),
            (Self::Edwards(key), Algorithm::EdDSA) => key.verify_sig(signed, signature).is_ok(),
            (Self::Secret(secret), algorithm) => {
                let algorithm = match algorithm {
                    Algorithm::HS256 => hmac::HMAC_SHA256,
                    Algorithm::HS384 => hmac::HMAC_SHA384,
                    Algorithm::HS512 => hmac::HMAC_SHA512,
                    _ => return false,
                };
                hmac::verify(&hmac::Key::new(algorithm, secret), signed, signature).is_ok()
            }
            _ => false,
        }
    }
}

impl std::fmt::Debug for Material {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Rsa { .. } => "RSA",
            Self::Elliptic { .. } => "EC",
            Self::Edwards(_) => "Ed25519",
            Self::Secret(_) => "secret",
        })
    }
}
