//! What can be wrong with a token or its keys, in Envoy's words: clients and logs see them.

/// Why a token is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// There is none.
    #[error("Jwt is missing")]
    Missing,
    /// `nbf` is in the future.
    #[error("Jwt not yet valid")]
    NotYetValid,
    /// `exp` is in the past.
    #[error("Jwt is expired")]
    Expired,
    /// Not three parts with dots between them.
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    Form,
    /// The head is not base64url.
    #[error("Jwt header is an invalid Base64url encoded")]
    HeaderEncoding,
    /// The head is not JSON.
    #[error("Jwt header is an invalid JSON")]
    HeaderJson,
    /// No algorithm.
    #[error("Jwt header [alg] field is required and must be a string")]
    NoAlgorithm,
    /// An algorithm that nobody should use, or nobody knows.
    #[error("Jwt header [alg] is not supported")]
    Algorithm,
    /// A key identifier that is none.
    #[error("Jwt header [kid] field is not a string")]
    KeyId,
    /// The token names extensions that must be understood, and we understand none (Envoy does not look).
    #[error("Jwt header [crit] names what is not supported")]
    Critical,
    /// The payload is not base64url.
    #[error("Jwt payload is an invalid Base64url encoded")]
    PayloadEncoding,
    /// The payload is not JSON, or has a claim twice.
    #[error("Jwt payload is an invalid JSON")]
    PayloadJson,
    /// A claim is not what it must be.
    #[error("Jwt payload [{claim}] field is not {wanted}")]
    Claim {
        /// Its name.
        claim: &'static str,
        /// What it must be.
        wanted: &'static str,
    },
    /// The signature is not base64url.
    #[error("Jwt signature is an invalid Base64url encoded")]
    SignatureEncoding,
    /// No provider has this issuer.
    #[error("Jwt issuer is not configured")]
    UnknownIssuer,
    /// Meant for others.
    #[error("Audiences in Jwt are not allowed")]
    Audience,
    /// No key made the signature.
    #[error("Jwt verification fails")]
    Signature,
    /// The keys are not JSON.
    #[error("Jwks is an invalid JSON")]
    KeysJson,
    /// The keys are not there.
    #[error("Jwks does not have [keys] field")]
    NoKeysField,
    /// The keys are no list.
    #[error("[keys] in Jwks is not an array")]
    KeysNotArray,
    /// None of the keys can be used.
    #[error("Jwks doesn't have any valid public key")]
    NoValidKeys,
    /// No key with the token's identifier or algorithm.
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    NoMatchingKey,
    /// The keys could not be had.
    #[error("Jwks remote fetch is failed")]
    FetchFailed,
}

impl Problem {
    /// What access logs show as details.
    pub fn details(self) -> String {
        format!("jwt_authn_access_denied{{{}}}", self.to_string().replace(' ', "_"))
    }
}
