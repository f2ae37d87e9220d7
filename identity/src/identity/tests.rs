//! Rotation, expiry and configurations, under a clock that stands still where time matters.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use cairn_exchange::clock;

use super::*;
use crate::{
    generate::Authority,
    testing::{handshake, id},
};

const HOUR: Duration = Duration::from_secs(3600);
const LOCAL: [&str; 1] = ["spiffe://cluster.local/"];

fn authority() -> Arc<Authority> {
    Arc::new(Authority::new("cluster.local").unwrap())
}

fn us() -> SpiffeId {
    id("spiffe://cluster.local/ns/app/sa/waypoint")
}

/// An identity whose certificates of `life` come from memory, as long as `works`; counts what was asked.
fn rotating(life: Duration, works: &Arc<AtomicBool>) -> (Identity, Arc<AtomicUsize>) {
    let shared = Arc::new(Shared::new(
        crate::Compliance::default(),
        WallClock::following_tokio(clock::wall()),
    ));
    let (authority, asked) = (authority(), Arc::new(AtomicUsize::new(0)));
    let mut tasks = JoinSet::new();
    tasks.spawn({
        let (shared, works, asked) = (shared.clone(), works.clone(), asked.clone());
        async move {
            let renewal = Renewal {
                ratio: 0.5,
                jitter: 0.01,
            };
            rotation::keep_fresh(&shared, renewal, || {
                asked.fetch_add(1, Relaxed);
                let answer = match works.load(Relaxed) {
                    true => Ok(authority.issue_for(&us(), shared.wall().now(), life).unwrap()),
                    false => Err(std::io::Error::other("the authority is on holiday")),
                };
                std::future::ready(answer)
            })
            .await;
        }
    });
    (
        Identity {
            shared,
            _tasks: Arc::new(tasks),
        },
        asked,
    )
}

async fn pass(time: Duration) {
    tokio::time::sleep(time).await;
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_at_half_of_its_life() {
    let (identity, asked) = rotating(24 * HOUR, &Arc::new(AtomicBool::new(true)));
    identity.ready().await;
    let first = identity.status();
    let terms = ServerTerms::hbone(LOCAL);
    let before = identity.server_config(&terms).unwrap();
    assert!(
        Arc::ptr_eq(&before, &identity.server_config(&terms).unwrap()),
        "one configuration a generation"
    );
    pass(HOUR * 23 / 2).await;
    assert_eq!((identity.status().serial, asked.load(Relaxed)), (first.serial.clone(), 1));
    pass(HOUR).await;
    let second = identity.status();
    assert_eq!((second.generation, asked.load(Relaxed)), (2, 2));
    assert_ne!(second.serial, first.serial);
    let renewed_after = second
        .last_renewal
        .unwrap()
        .duration_since(first.last_renewal.unwrap())
        .unwrap();
    assert!(
        renewed_after > 24 * HOUR * 48 / 100 && renewed_after < 24 * HOUR * 52 / 100,
        "{renewed_after:?}"
    );
    assert!(
        !Arc::ptr_eq(&before, &identity.server_config(&terms).unwrap()),
        "the new certificate is in use"
    );
}

#[tokio::test(start_paused = true)]
async fn a_failing_renewal_keeps_the_old_certificate_to_its_end_and_no_longer() {
    let works = Arc::new(AtomicBool::new(true));
    let (identity, asked) = rotating(24 * HOUR, &works);
    identity.ready().await;
    let serial = identity.status().serial;
    works.store(false, Relaxed);
    let terms = (ServerTerms::hbone(LOCAL), ClientTerms::hbone(LOCAL));
    pass(13 * HOUR).await;
    let status = identity.status();
    assert_eq!((&status.serial, status.generation), (&serial, 1));
    assert_eq!(status.last_error.as_deref(), Some("the authority is on holiday"));
    assert!(
        (100..400).contains(&status.failures),
        "tried again, but bounded: {} times in an hour",
        status.failures
    );
    assert!(identity.server_config(&terms.0).is_some() && identity.client_config(&terms.1).is_some());

    pass(11 * HOUR + Duration::from_secs(5)).await;
    assert!(identity.server_config(&terms.0).is_none() && identity.client_config(&terms.1).is_none());
    let why = identity.unavailable().unwrap().to_string();
    assert!(
        why.contains("expired at") && why.ends_with(": the authority is on holiday"),
        "{why}"
    );

    works.store(true, Relaxed);
    let before = asked.load(Relaxed);
    pass(crate::backoff::CAP + Duration::from_secs(1)).await;
    assert!(
        identity.server_config(&terms.0).is_some(),
        "a certificate that comes late serves again"
    );
    assert_eq!((identity.status().last_error, asked.load(Relaxed)), (None, before + 1));
}

#[tokio::test(start_paused = true)]
async fn very_short_lives_do_not_become_a_loop_of_requests() {
    let (identity, asked) = rotating(Duration::from_millis(1500), &Arc::new(AtomicBool::new(true)));
    identity.ready().await;
    pass(Duration::from_secs(60)).await;
    assert!((20..=61).contains(&asked.load(Relaxed)), "{}", asked.load(Relaxed));
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_the_last_clone() {
    let (identity, asked) = rotating(24 * HOUR, &Arc::new(AtomicBool::new(true)));
    identity.ready().await;
    let clone = identity.clone();
    drop(identity);
    pass(13 * HOUR).await;
    assert_eq!(asked.load(Relaxed), 2, "a clone keeps it");
    drop(clone);
    pass(48 * HOUR).await;
    assert_eq!(asked.load(Relaxed), 2);
}

#[tokio::test]
async fn a_session_is_resumed_within_a_generation_and_never_in_the_next() {
    let authority = authority();
    let identity = Identity::fixed(authority.issue(&us()).unwrap());
    let terms = ServerTerms::hbone(LOCAL);
    let mut client = rustls::ClientConfig::clone(&identity.client_config(&ClientTerms::hbone(LOCAL)).unwrap());
    client.resumption = rustls::client::Resumption::in_memory_sessions(4);
    let client = Arc::new(client);
    let resumed = async || {
        let server = identity.server_config(&terms).unwrap();
        handshake(server, client.clone()).await.ok().unwrap().resumed
    };
    assert_eq!((resumed().await, resumed().await), (false, true));
    // The same authority, even: what counts is that the new bundle is asked.
    identity.shared.install(authority.issue(&us()).unwrap(), None);
    assert!(!resumed().await);
    assert!(resumed().await);
    identity.shared.set_revocation_lists(RevocationState::Known(Arc::default()));
    assert!(!resumed().await);
    assert_eq!(identity.status().generation, 3);
}

#[tokio::test]
async fn watchers_hear_of_each_generation() {
    let authority = authority();
    let identity = Identity::start(Source::Fixed(authority.issue(&us()).unwrap()));
    let mut watch = identity.watch();
    assert_eq!(*watch.borrow_and_update(), 1);
    assert!(!watch.has_changed().unwrap());
    identity.shared.install(authority.issue(&us()).unwrap(), None);
    assert!(watch.has_changed().unwrap());
    assert_eq!(*watch.borrow_and_update(), 2);
}

#[tokio::test]
async fn configurations_are_kept_for_each_terms_and_bounded() {
    let identity = Identity::fixed(authority().issue(&us()).unwrap());
    let terms = |number: usize| ServerTerms::hbone([format!("spiffe://domain-{number}/")]);
    let last = identity.server_config(&terms(MAX_CONFIGS)).unwrap();
    for number in 0..MAX_CONFIGS - 1 {
        identity.server_config(&terms(number)).unwrap();
    }
    assert!(Arc::ptr_eq(&last, &identity.server_config(&terms(MAX_CONFIGS)).unwrap()));
    identity.server_config(&terms(MAX_CONFIGS + 1)).unwrap();
    let kept = identity.shared.current.load().as_ref().unwrap().servers.built.load().len();
    assert_eq!(kept, MAX_CONFIGS);
    assert!(
        !Arc::ptr_eq(&last, &identity.server_config(&terms(MAX_CONFIGS)).unwrap()),
        "the oldest went"
    );
}

#[tokio::test]
async fn further_trust_anchors_are_believed_until_they_are_taken_back() {
    let (ours, theirs) = (authority(), authority());
    let identity = Identity::fixed(ours.issue(&us()).unwrap());
    let stranger = Identity::fixed(theirs.issue(&id("spiffe://cluster.local/ns/app/sa/client")).unwrap());
    stranger.set_trust_anchors(&[ours.root_pem()]).unwrap();
    let meets = async || {
        let server = identity.server_config(&ServerTerms::hbone(LOCAL)).unwrap();
        let client = stranger.client_config(&ClientTerms::hbone(LOCAL)).unwrap();
        handshake(server, client).await.is_ok()
    };
    assert!(!meets().await);
    let pem = [theirs.root_pem()];
    identity.set_trust_anchors(&pem).unwrap();
    assert!(meets().await);
    let generation = identity.status().generation;
    identity.set_trust_anchors(&pem).unwrap();
    assert_eq!((identity.status().generation, identity.status().anchors), (generation, 1));
    // They stay when the certificate is renewed, and when what comes next cannot be read.
    identity.shared.install(ours.issue(&us()).unwrap(), None);
    assert!(identity.set_trust_anchors(&["no certificate".to_owned()]).is_err());
    assert!(meets().await);
    identity.set_trust_anchors(&[]).unwrap();
    assert!(!meets().await);
}

#[tokio::test]
async fn a_compliance_policy_narrows_every_configuration() {
    let options = Options {
        compliance: crate::Compliance::PostQuantum,
        ..Options::default()
    };
    let identity = Identity::start_with(Source::Fixed(authority().issue(&us()).unwrap()), options);
    let server = identity.server_config(&ServerTerms::hbone(LOCAL)).unwrap();
    let client = identity.client_config(&ClientTerms::hbone(LOCAL)).unwrap();
    for provider in [server.crypto_provider(), client.crypto_provider()] {
        let groups: Vec<_> = provider.kx_groups.iter().map(|group| group.name()).collect();
        assert_eq!(groups, [rustls::NamedGroup::X25519MLKEM768]);
    }
}
