//! Tunnels, and whether their peers are believed still.
//!
//! A tunnel lives for hours; a certificate is revoked, a root is taken out of the trust bundle, a trust domain out of the listener's
//! terms meanwhile. So the proxy keeps the chain that each peer has shown, and a task off the data path verifies it again when trust has
//! changed (not when our own certificate was renewed). A peer that is believed no more is told so by GOAWAY, has [`GRACE`] to finish,
//! and then its connection is closed. This is one of the exceptions to "no configuration change closes a connection" (architecture §4,
//! rule 2); tunnels of all others are not touched.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use cairn_exchange::{SpiffeId, clock};
use cairn_identity::{ClientTrust, Distrusted};
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use tokio::time::sleep;

use crate::{proxy::Proxy, snapshot::Terminate};

/// How long what a distrusted peer has under way may go on.
pub const GRACE: Duration = Duration::from_secs(5);
/// How often it is looked whether trust has changed.
const LOOK: Duration = Duration::from_millis(100);
const SHARDS: usize = 16;
/// After so many chains the thread is left to others.
const AT_ONCE: usize = 64;

/// All tunnels whose peers have shown certificates.
#[derive(Default)]
pub struct TrustedTunnels {
    shards: [Mutex<Vec<Weak<Trusted>>>; SHARDS],
    next: AtomicU64,
}

/// A tunnel whose peer was believed. It is forgotten when this is dropped.
pub struct Trusted {
    id: Option<SpiffeId>,
    address: SocketAddr,
    chain: Vec<CertificateDer<'static>>,
    /// When the handshake was.
    at: SystemTime,
    distrusted: AtomicBool,
    waker: AtomicWaker,
}

/// What trust rests on: changes when trust may have changed.
#[derive(Clone, Default)]
pub struct Grounds {
    terminate: Option<Arc<Terminate>>,
    mark: u64,
}

// === impl Grounds ===

impl Grounds {
    /// Those of this moment.
    pub fn now(proxy: &Proxy) -> Self {
        Self {
            terminate: proxy.snapshot.load().terminate.clone(),
            mark: proxy.identity.trust_mark(),
        }
    }

    fn are(&self, others: &Self) -> bool {
        let same_terms = match (&self.terminate, &others.terminate) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other) || one.tls == other.tls,
            (None, None) => true,
            _ => false,
        };
        self.mark == others.mark && same_terms
    }

    /// What they come to; nothing while nobody can be asked.
    fn trust(&self, proxy: &Proxy) -> Option<ClientTrust> {
        proxy.identity.client_trust(&self.terminate.as_ref()?.tls)
    }
}

// === impl TrustedTunnels ===

impl TrustedTunnels {
    /// A tunnel whose peer, by these grounds, was believed in its handshake.
    pub fn enter(
        &self,
        proxy: &Proxy,
        grounds: &Grounds,
        id: Option<SpiffeId>,
        address: SocketAddr,
        chain: Vec<CertificateDer<'static>>,
    ) -> Arc<Trusted> {
        let trusted = Arc::new(Trusted {
            id,
            address,
            chain,
            at: clock::wall(),
            distrusted: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        });
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        #[expect(clippy::cast_possible_truncation, reason = "the remainder is small")]
        let shard = self.shards.get((number % SHARDS as u64) as usize);
        if let Some(shard) = shard {
            let mut all = shard.lock();
            // Those that have ended go before the list would grow.
            if all.len() == all.capacity() {
                all.retain(|tunnel| tunnel.strong_count() > 0);
            }
            all.push(Arc::downgrade(&trusted));
        }
        // A change during the handshake may have been looked at without it.
        let now = Grounds::now(proxy);
        if !now.are(grounds)
            && let Some(trust) = now.trust(proxy)
            && let Err(why) = trust.check(&trusted.chain, trusted.at)
        {
            trusted.distrust(&why);
        }
        trusted
    }

    /// Verifies all of them by this trust.
    async fn verify(&self, trust: &ClientTrust) {
        // One ztunnel has many tunnels with one certificate.
        let mut known: HashMap<Vec<CertificateDer<'static>>, Result<(), Distrusted>> = HashMap::new();
        let mut verified = 0;
        for shard in &self.shards {
            let all: Vec<_> = {
                let mut all = shard.lock();
                all.retain(|tunnel| tunnel.strong_count() > 0);
                all.iter().filter_map(Weak::upgrade).collect()
            };
            for tunnel in all {
                let verdict = match known.get(&tunnel.chain) {
                    Some(verdict) => verdict.clone(),
                    None => {
                        verified += 1;
                        if verified % AT_ONCE == 0 {
                            tokio::task::yield_now().await;
                        }
                        let verdict = trust.check(&tunnel.chain, tunnel.at);
                        known.insert(tunnel.chain.clone(), verdict.clone());
                        verdict
                    }
                };
                if let Err(why) = verdict {
                    tunnel.distrust(&why);
                }
            }
        }
    }
}

impl std::fmt::Debug for TrustedTunnels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrustedTunnels").finish_non_exhaustive()
    }
}

/// Verifies peers again whenever trust has changed, for as long as there is a proxy.
pub async fn watch(proxy: Weak<Proxy>) {
    let mut seen = Grounds::default();
    let mut mark = None;
    loop {
        sleep(LOOK).await;
        let Some(proxy) = proxy.upgrade() else { return };
        let grounds = Grounds::now(&proxy);
        if grounds.are(&seen) {
            continue;
        }
        // Without trust there is nobody to ask: what is open stays, and nothing new comes.
        let Some(trust) = grounds.trust(&proxy) else { continue };
        if seen.mark != 0 && seen.mark != grounds.mark {
            proxy.connector.trust_changed();
        }
        if mark.replace(trust.mark()) != Some(trust.mark()) {
            proxy.trusted.verify(&trust).await;
        }
        seen = grounds;
    }
}

// === impl Trusted ===

impl Trusted {
    fn distrust(&self, why: &Distrusted) {
        if self.distrusted.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::info!(
            peer = self.id.as_ref().map_or("-", SpiffeId::as_str),
            client = %self.address,
            root = %cairn_identity::root_name(&self.chain),
            %why,
            "a tunnel is ended: its peer's certificate is believed no more"
        );
        self.waker.wake();
    }

    /// Ready when the peer is believed no more.
    pub fn poll_distrusted(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.waker.register(cx.waker());
        if self.distrusted.load(Ordering::Acquire) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}
