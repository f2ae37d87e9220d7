//! One request: key, CSR, token, call.

use std::{path::PathBuf, time::Duration};

use cairn_proto::istio::v1::auth::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient};
use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::time::timeout;
use tonic::{
    Code, Request,
    metadata::{AsciiMetadataKey, AsciiMetadataValue, MetadataMap},
};

use super::{
    CaSettings,
    answer::{self, AnswerError},
    connect::{self, ConnectError},
    output,
};
use crate::{
    credentials::Credentials,
    read::{self, ReadError},
    wall::WallClock,
};

/// From the request to the whole answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const TOKEN_REMEDY: &str =
    "it should hold a service account token for audience istio-ca (the pod's projected volume istio-token)";

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The key or request could not be made.
    #[error("making a key and a signing request for {0}: {1}")]
    Csr(String, rcgen::Error),
    /// There is no usable token.
    #[error("the token that istiod knows us by: {0}")]
    Token(#[from] TokenError),
    /// A setting cannot be sent.
    #[error("{name:?} with value {value:?} cannot be sent as a header to the CA; correct CA_HEADER_{name} or the cluster id")]
    Header {
        /// The header's name.
        name: String,
        /// Its value.
        value: String,
    },
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The authority did not answer in time.
    #[error("the CA at {0} did not answer within {CALL_TIMEOUT:?}")]
    Timeout(String),
    /// The authority does not know us.
    #[error("the CA at {address} refused the token in {}: {message}; is it expired, or for another audience than istio-ca?", path.display())]
    Unauthenticated {
        /// Where.
        address: String,
        /// The token's file.
        path: PathBuf,
        /// Its words.
        message: String,
    },
    /// The authority refused or failed.
    #[error("the CA at {address} answered {code:?}: {message}")]
    Refused {
        /// Where.
        address: String,
        /// gRPC's code.
        code: Code,
        /// Its words.
        message: String,
    },
    /// The answer is not what was asked for.
    #[error("the answer of the CA at {0} is unusable: {1}")]
    Answer(String, Box<AnswerError>),
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The file is empty.
    #[error("{} is empty; {TOKEN_REMEDY}", .0.display())]
    Empty(PathBuf),
    /// What it holds is no token.
    #[error("{} holds something else than a token (line breaks or control characters); {TOKEN_REMEDY}", .0.display())]
    Malformed(PathBuf),
}

/// A new key and a certificate for it.
pub(crate) async fn issue(settings: &CaSettings, wall: &WallClock) -> Result<Credentials, IssueError> {
    let (key, csr) = csr(settings)?;
    let written = settings.output.as_ref().map(|folder| (folder.clone(), key.serialize_pem()));
    let key = PrivatePkcs8KeyDer::from(key).into();
    let mut request = Request::new(IstioCertificateRequest {
        csr,
        validity_duration: i64::try_from(settings.ttl.as_secs()).unwrap_or(i64::MAX),
        metadata: metadata(settings),
    });
    add_headers(request.metadata_mut(), settings, token(settings).await?)?;
    request.set_timeout(CALL_TIMEOUT);

    let _turn = match &settings.turns {
        Some(turn) => Some(turn.take().await),
        None => None,
    };
    let channel = connect::connect(settings).await?;
    let mut client = IstioCertificateServiceClient::new(channel);
    let answer = timeout(CALL_TIMEOUT, client.create_certificate(request))
        .await
        .map_err(|_| IssueError::Timeout(settings.address.clone()))?
        .map_err(|status| refused(settings, &status))?
        .into_inner();
    let credentials = answer::check(&answer.cert_chain, key, &settings.id, wall.now())
        .map_err(|error| IssueError::Answer(settings.address.clone(), error.into()))?;
    if let Some((folder, key)) = written {
        put_out(folder, key, answer.cert_chain).await;
    }
    Ok(credentials)
}

/// Writes a certificate for others; that it cannot be written is no reason not to use it.
async fn put_out(folder: PathBuf, key: String, chain: Vec<String>) {
    let place = folder.display().to_string();
    let written = tokio::task::spawn_blocking(move || output::write(&folder, &key, &chain)).await;
    if let Some(error) = written.map_or_else(
        |error| Some(error.to_string()),
        |done| done.err().map(|error| error.to_string()),
    ) {
        tracing::warn!(
            "the certificate cannot be written to {place} (OUTPUT_CERTS): {error}; is it a folder that we may write to?"
        );
    }
}

/// A key, and a request for it with an empty subject and one URI SAN.
fn csr(settings: &CaSettings) -> Result<(KeyPair, String), IssueError> {
    let failed = |error| IssueError::Csr(settings.id.to_string(), error);
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(settings.id.as_str().try_into().map_err(failed)?)];
    let csr = params.serialize_request(&key).and_then(|csr| csr.pem()).map_err(failed)?;
    Ok((key, csr))
}

/// Which signer, and whose certificate where it is not the token's owner.
fn metadata(settings: &CaSettings) -> Option<Struct> {
    let text = |name: &str, text: &str| {
        let kind = Some(Kind::StringValue(text.to_owned()));
        (name.to_owned(), Value { kind })
    };
    let signer = settings.cert_signer.as_deref().map(|signer| text("CertSigner", signer));
    let whose = settings
        .impersonate
        .then(|| text("ImpersonatedIdentity", settings.id.as_str()));
    let fields: std::collections::BTreeMap<_, _> = signer.into_iter().chain(whose).collect();
    (!fields.is_empty()).then_some(Struct { fields })
}

/// The token as it lies in its file now: kubelet replaces it long before it expires.
async fn token(settings: &CaSettings) -> Result<String, TokenError> {
    let path = &settings.token_file;
    let content = read::file(path, TOKEN_REMEDY).await?;
    let token = content.trim_ascii();
    if token.is_empty() {
        return Err(TokenError::Empty(path.clone()));
    }
    if !token.iter().all(u8::is_ascii_graphic) {
        return Err(TokenError::Malformed(path.clone()));
    }
    Ok(token.iter().map(|byte| char::from(*byte)).collect())
}

fn add_headers(metadata: &mut MetadataMap, settings: &CaSettings, token: String) -> Result<(), IssueError> {
    let cluster = ("ClusterID".to_owned(), settings.cluster_id.clone());
    for (name, value) in std::iter::once(&cluster).chain(&settings.headers) {
        let bad = || IssueError::Header {
            name: name.clone(),
            value: value.clone(),
        };
        let key: AsciiMetadataKey = name.to_ascii_lowercase().parse().map_err(|_| bad())?;
        metadata.insert(key, value.parse().map_err(|_| bad())?);
    }
    let mut bearer: AsciiMetadataValue = format!("Bearer {token}")
        .parse()
        .map_err(|_| TokenError::Malformed(settings.token_file.clone()))?;
    bearer.set_sensitive(true);
    metadata.insert("authorization", bearer);
    Ok(())
}

fn refused(settings: &CaSettings, status: &tonic::Status) -> IssueError {
    let address = settings.address.clone();
    let message = status.message().to_owned();
    match status.code() {
        Code::Unauthenticated => IssueError::Unauthenticated {
            address,
            path: settings.token_file.clone(),
            message,
        },
        code => IssueError::Refused { address, code, message },
    }
}
