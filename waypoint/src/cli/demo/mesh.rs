//! The mesh of the demonstration: a certificate authority, pods, the waypoint, and entrances for whoever has no mesh.
//!
//! The waypoint is the [`Engine`] that runs in a cluster, on the configuration that istiod made. Everything ends with the runtime that
//! it was started on.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use cairn_exchange::SpiffeId;
use cairn_identity::{Identity, generate::Authority};
use tokio::sync::mpsc;

use super::{
    StartError,
    capture::{self, Answer},
    entrance::{Entrances, Place, VISITOR},
    pod,
    told::Told,
};
use crate::{
    config::{Compiler, Effect},
    engine::{Engine, Parts},
    proxy::DataSettings,
};

/// The trust domain of the manifests.
pub const TRUST_DOMAIN: &str = "cluster.local";
/// The port on which everybody in a mesh accepts tunnels.
pub const HBONE_PORT: u16 = 15008;
/// The namespace of the manifests.
const NAMESPACE: &str = "demo";
/// What may wait to be told; what comes on top is not told.
const MAX_WAITING: usize = 1024;

/// What a mesh is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The first entrance; the others are at the ports after it. Port 0: any ports.
    pub listen: SocketAddr,
    /// The second number of the mesh's addresses, below 10.
    pub octet: u8,
    /// A captured configuration instead of the one that is built in.
    pub config: Option<PathBuf>,
}

/// A mesh that runs.
pub struct Mesh {
    /// Where the waypoint accepts tunnels.
    pub waypoint: SocketAddr,
    /// Where each place can be entered, as in [`Place::ALL`].
    pub entrances: Vec<(Place, SocketAddr)>,
    /// The pods: name, and where its tunnels end.
    pub pods: Vec<(String, SocketAddr)>,
    /// What the waypoint cannot do yet and refuses instead.
    pub refused: Vec<String>,
    /// Each request and connection, as it ends.
    pub told: mpsc::Receiver<Told>,
    /// The waypoint; it lives as long as this does.
    _engine: Engine,
}

/// Where a request is told.
#[derive(Clone)]
pub struct Tell(mpsc::Sender<Told>);

// === impl Tell ===

impl Tell {
    /// Tells, unless too much waits to be told already: a line is not worth holding a request up.
    pub fn tell(&self, told: Told) {
        let _ = self.0.try_send(told);
    }
}

// === impl Settings ===

impl Settings {
    /// Where the waypoint accepts tunnels.
    fn waypoint(&self) -> SocketAddr {
        SocketAddr::new(Ipv4Addr::new(127, self.octet, 0, 1).into(), HBONE_PORT)
    }

    /// The visitor's address, as in the manifests.
    fn visitor(&self) -> IpAddr {
        Ipv4Addr::new(127, self.octet, 1, 1).into()
    }

    /// Where the entrance with this number is.
    fn entrance(&self, number: u16) -> Result<SocketAddr, StartError> {
        let port = match self.listen.port() {
            0 => Some(0),
            first => first.checked_add(number),
        };
        let port = port.ok_or(StartError::PortTooHigh(self.listen))?;
        Ok(SocketAddr::new(self.listen.ip(), port))
    }
}

// === impl Mesh ===

impl Mesh {
    /// Starts everything, on the runtime that calls.
    pub fn start(settings: &Settings) -> Result<Self, StartError> {
        let answers = capture::answers(settings.config.as_deref(), settings.octet)?;
        let authority = Authority::new(TRUST_DOMAIN).map_err(|error| StartError::Identity(error.to_string()))?;
        let (sender, told) = mpsc::channel(MAX_WAITING);
        let tell = Tell(sender);
        let observer = tell.clone();
        let engine = Engine::new(Parts {
            identity: identity(&authority, "waypoint")?,
            network: String::new(),
            version: env!("CARGO_PKG_VERSION").into(),
            settings: DataSettings {
                listen: Some(settings.waypoint()),
                ..DataSettings::default()
            },
            observer: Some(Box::new(move |exchange| observer.tell(Told::of(exchange)))),
        });
        let refused = configure(&engine, answers)?;

        let pods = pod::all(&engine.snapshot.load())?;
        let mut listening = Vec::new();
        for pod in pods {
            listening.push((pod.app.pod.clone(), pod.address));
            pod.start(&authority)?;
        }
        engine
            .listen()
            .map_err(|error| StartError::waypoint(settings.waypoint(), error))?;

        let entrances = Arc::new(Entrances::new(
            identity(&authority, VISITOR)?,
            settings.visitor(),
            settings.waypoint(),
            tell,
        ));
        let mut open = Vec::new();
        for (number, place) in (0..).zip(Place::ALL) {
            open.push((place, entrances.open(settings.entrance(number)?, place)?));
        }
        Ok(Self {
            waypoint: settings.waypoint(),
            entrances: open,
            pods: listening,
            refused,
            told,
            _engine: engine,
        })
    }

    /// Where this place can be entered.
    pub fn entrance(&self, place: Place) -> Option<SocketAddr> {
        self.entrances
            .iter()
            .find(|(of, _)| *of == place)
            .map(|(_, address)| *address)
    }
}

/// Credentials for a service account of the mesh.
fn identity(authority: &Authority, service_account: &str) -> Result<Identity, StartError> {
    let id =
        SpiffeId::workload(TRUST_DOMAIN, NAMESPACE, service_account).map_err(|error| StartError::Identity(error.to_string()))?;
    let credentials = authority
        .issue(&id)
        .map_err(|error| StartError::Identity(error.to_string()))?;
    Ok(Identity::fixed(credentials))
}

/// Gives the engine its configuration, and returns what it refuses for want of support.
fn configure(engine: &Engine, answers: Vec<Answer>) -> Result<Vec<String>, StartError> {
    let mut compiler = Compiler::new(engine.workloads.clone(), engine.snapshot.clone(), Some(engine.logs.clone()))
        .feeding(engine.sources.clone());
    for Answer { type_url, resources } in answers {
        compiler.apply(&type_url, resources, Vec::new());
    }
    let missing = compiler.missing();
    if !missing.is_empty() {
        return Err(StartError::Incomplete(missing.join("; ")));
    }
    let unsupported = compiler.unsupported();
    let refused = unsupported.iter().filter(|item| item.effect != Effect::Ignored);
    Ok(refused
        .map(|item| format!("{}: {}", service(item.chain.as_ref().unwrap_or(&item.resource)), item.what))
        .collect())
}

/// Port and service in the name of a chain or cluster, `inbound-vip|80|http|vault.demo.svc.cluster.local`; other names as they are.
fn service(name: &str) -> String {
    match name.split('|').collect::<Vec<_>>().as_slice() {
        [_, port, _, host] => format!("{host}:{port}"),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_told_by_their_service() {
        assert_eq!(
            service("inbound-vip|80|http|vault.demo.svc.cluster.local"),
            "vault.demo.svc.cluster.local:80"
        );
        assert_eq!(service("connect_terminate"), "connect_terminate");
    }

    #[test]
    fn entrances_need_ports_after_the_first() {
        let settings = |listen: &str| Settings {
            listen: listen.parse().unwrap(),
            octet: 0,
            config: None,
        };
        assert_eq!(settings("127.0.0.1:8080").entrance(4).unwrap().port(), 8084);
        assert_eq!(settings("127.0.0.1:0").entrance(4).unwrap().port(), 0);
        assert!(matches!(
            settings("127.0.0.1:65534").entrance(4),
            Err(StartError::PortTooHigh(_))
        ));
    }

    #[tokio::test]
    async fn a_configuration_that_cannot_run_here_is_named_with_what_to_do() {
        let fixtures =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance/fixtures/xds/istio-1.27.9/01-http-basic");
        let partial = tempfile::tempdir().unwrap();
        std::fs::copy(fixtures.join("cds.pb"), partial.path().join("cds.pb")).unwrap();
        for (folder, says) in [
            (
                fixtures.as_path(),
                "has an endpoint at 10.244.0.10:8080 (cluster inbound-vip|80|http|web.app.svc.cluster.local)",
            ),
            (partial.path(), "is not complete, so nothing would be served"),
        ] {
            let settings = Settings {
                listen: "127.0.0.1:0".parse().unwrap(),
                octet: 0,
                config: Some(folder.to_owned()),
            };
            let error = Mesh::start(&settings).err().unwrap().to_string();
            assert!(error.contains(says) && error.to_lowercase().contains("capture"), "{error}");
        }
    }
}
