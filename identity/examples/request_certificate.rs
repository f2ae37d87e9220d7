//! Asks an authority for a certificate and prints what came: `request_certificate ADDRESS ROOT_FILE TOKEN_FILE SPIFFE_ID [SECONDS]`.
//!
//! With a number of seconds as the certificate's life it stays and prints each renewal, until it is interrupted.

use std::{process::ExitCode, time::Duration};

use cairn_identity::{CaSettings, ClientTerms, Identity, ServerTerms, Source};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, root_file, token_file, id, life @ ..] = arguments.as_slice() else {
        eprintln!("usage: request_certificate ADDRESS ROOT_FILE TOKEN_FILE SPIFFE_ID [SECONDS]");
        return ExitCode::FAILURE;
    };
    let id = match id.parse() {
        Ok(id) => id,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let mut settings = CaSettings {
        root_file: root_file.into(),
        token_file: token_file.into(),
        ..CaSettings::new(address, id)
    };
    let life = life.first().and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    settings.ttl = life.unwrap_or(settings.ttl);

    let identity = Identity::start(Source::CertificateAuthority(settings));
    let mut generations = identity.watch();
    loop {
        // Fails only when the identity is gone, and it is ours.
        let came = tokio::time::timeout(Duration::from_secs(20), generations.changed()).await;
        println!("{:#?}", identity.status());
        if let Some(reason) = identity.unavailable() {
            eprintln!("{reason}");
            return ExitCode::FAILURE;
        }
        let trusted: [&str; 0] = [];
        let usable = identity.try_server_config(&ServerTerms::hbone(trusted)).err();
        let usable = usable.or(identity.try_client_config(&ClientTerms::hbone(trusted)).err());
        if let Some(reason) = usable {
            eprintln!("{reason}");
            return ExitCode::FAILURE;
        }
        if life.is_none() || came.is_err() {
            return ExitCode::SUCCESS;
        }
    }
}
