//! `cairn proxy waypoint` as a process of its own, with an istiod that comes late and goes early.
//!
//! The configuration is what a real istiod sent; certificates are mounted files. The process's folder is a temporary one, so that its
//! relative paths lead nowhere else.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    io::Read as _,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    pin::Pin,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use cairn_exchange::clock;
use cairn_identity::generate::Authority;
use cairn_proto::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
    aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
};
use cairn_waypoint::config::load::{Answer, load};
use futures_util::{Stream, StreamExt as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

const CAPTURE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../conformance/fixtures/xds/istio-1.31.0-20260827/01-http-basic"
);
/// Longer than anything here may take.
const LIMIT: Duration = Duration::from_secs(30);
const DRAIN: Duration = Duration::from_secs(1);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Answers each type once, with all that was captured of it.
struct Istiod {
    answers: Vec<Answer>,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Istiod {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta only"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let mut left = self.answers.clone();
        let answers = request.into_inner().filter_map(move |request| {
            let of_type = request
                .ok()
                .and_then(|request| left.iter().position(|answer| answer.type_url == request.type_url));
            let response = of_type.map(|at| Ok(response(left.swap_remove(at))));
            async move { response }
        });
        // The stream stays open when nothing is left to be said.
        Ok(Response::new(Box::pin(answers)))
    }
}

fn response(answer: Answer) -> DeltaDiscoveryResponse {
    let Answer {
        type_url,
        system_version,
        resources,
        removed: _,
    } = answer;
    let resources = resources.into_iter().map(|resource| Resource {
        name: resource.name,
        version: resource.version,
        resource: Some(prost_types::Any {
            type_url: resource.type_url,
            value: resource.bytes.to_vec(),
        }),
        ..Resource::default()
    });
    DeltaDiscoveryResponse {
        resources: resources.collect(),
        nonce: format!("nonce of {type_url}"),
        system_version_info: system_version,
        type_url,
        ..DeltaDiscoveryResponse::default()
    }
}

/// Ports that nobody has now.
fn free_ports<const N: usize>() -> [u16; N] {
    let held = [(); N].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    held.map(|listener| listener.local_addr().unwrap().port())
}

/// The process, ended with the test.
struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Proxy {
    fn start(folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cairn"));
        command
            .arg("proxy")
            .args(arguments)
            .current_dir(folder)
            .env_clear()
            .envs(variables.iter().copied());
        Self(
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        )
    }

    async fn ended(&mut self) -> ExitStatus {
        let ended = async {
            loop {
                match self.0.try_wait().unwrap() {
                    Some(status) => return status,
                    None => sleep(Duration::from_millis(20)).await,
                }
            }
        };
        timeout(LIMIT, ended).await.expect("the process ends")
    }

    fn said(&mut self) -> String {
        let mut said = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        said
    }

    fn terminate(&self) {
        let id = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
    }
}

/// Status and body; `None` when nobody answers.
async fn get(port: u16, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()?;
    let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

/// Asks until the answer is as wished.
async fn until(port: u16, path: &str, wished: impl Fn(u16, &str) -> bool) -> (u16, String) {
    let mut last = None;
    let asking = async {
        loop {
            last = get(port, path).await;
            match &last {
                Some((status, body)) if wished(*status, body) => return,
                _ => sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let done = timeout(LIMIT, asking).await;
    done.unwrap_or_else(|_| panic!("{path}: {last:?}"));
    last.unwrap()
}

fn mounted_certificates(folder: &Path) {
    let id = "spiffe://cluster.local/ns/app/sa/waypoint".parse().unwrap();
    let pem = Authority::new("test")
        .unwrap()
        .issue_pem(&id, clock::wall(), Duration::from_secs(3600))
        .unwrap();
    let certs = folder.join("etc/certs");
    fs::create_dir_all(&certs).unwrap();
    for (name, content) in [
        ("cert-chain.pem", &pem.chain),
        ("key.pem", &pem.key),
        ("root-cert.pem", &pem.roots),
    ] {
        fs::write(certs.join(name), content).unwrap();
    }
}

const TEMPLATE: [&str; 9] = [
    "waypoint",
    "--domain",
    "app.svc.cluster.local",
    "--serviceCluster",
    "waypoint.app",
    "--proxyLogLevel",
    "warning",
    "--of-a-later-version",
    "--log_output_level=default:info",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_becomes_ready_with_istiod_and_stays_ready_without() {
    let folder = tempfile::tempdir().unwrap();
    mounted_certificates(folder.path());
    let [istiod, admin, agent, ready, metrics, tunnels] = free_ports();
    let config = format!(
        r#"{{"discoveryAddress": "127.0.0.1:{istiod}", "controlPlaneAuthPolicy": "NONE", "proxyAdminPort": {admin}, "statusPort": {agent},
            "terminationDrainDuration": "{}s"}}"#,
        DRAIN.as_secs()
    );
    let [ready_port, metrics_port] = [ready, metrics].map(|port| port.to_string());
    let listen = format!("127.0.0.1:{tunnels}");
    let variables = [
        ("POD_NAME", "waypoint-7d9f8b6c5-x2x4z"),
        ("POD_NAMESPACE", "app"),
        ("SERVICE_ACCOUNT", "waypoint"),
        ("INSTANCE_IP", "127.0.0.1"),
        ("ISTIO_CPU_LIMIT", "1"),
        ("PROXY_CONFIG", &config),
        ("ENVOY_STATUS_PORT", &ready_port),
        ("ENVOY_PROMETHEUS_PORT", &metrics_port),
        ("CAIRN_LISTEN", &listen),
    ];
    let mut proxy = Proxy::start(folder.path(), &variables, &TEMPLATE);

    // Nobody is there: it stays up, says so, and takes no tunnel.
    let waiting = format!("not ready: waiting for istiod at 127.0.0.1:{istiod}: no connection");
    let (status, body) = until(ready, "/healthz/ready", |_, body| body.starts_with(&waiting)).await;
    assert_eq!(status, 503, "{body}");
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, tunnels)).await.is_err());

    // istiod comes: with a runtime of its own, which takes its connections with it when it goes.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let service = AggregatedDiscoveryServiceServer::new(Istiod {
        answers: load(Path::new(CAPTURE)).unwrap(),
    });
    runtime.spawn(async move {
        let listener = tokio::net::TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, istiod)))
            .await
            .unwrap();
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await
            .unwrap();
    });
    until(ready, "/healthz/ready", |status, _| status == 200).await;
    assert_eq!(get(agent, "/healthz/ready").await.unwrap().0, 200);
    assert_eq!(get(admin, "/ready").await, Some((200, "LIVE\n".to_owned())));
    TcpStream::connect((Ipv4Addr::LOCALHOST, tunnels)).await.unwrap();
    let (_, services) = get(admin, "/services").await.unwrap();
    assert!(services.contains("inbound-vip|"), "{services}");
    let (_, text) = get(metrics, "/stats/prometheus").await.unwrap();
    assert!(
        text.contains("cairn_xds_connected 1\n") && text.contains("cairn_xds_acks_total{type=\"lds\"} 1\n"),
        "{text}"
    );

    // istiod goes.
    runtime.shutdown_background();
    until(metrics, "/stats/prometheus", |_, text| {
        text.contains("cairn_xds_connected 0\n")
    })
    .await;
    assert_eq!(get(ready, "/healthz/ready").await.unwrap().0, 200);

    // The end: not ready at once, tunnels are still accepted, exit code 0.
    let begin = clock::now();
    proxy.terminate();
    let (_, body) = until(ready, "/healthz/ready", |status, _| status == 503).await;
    assert!(body.contains("draining"), "{body}");
    TcpStream::connect((Ipv4Addr::LOCALHOST, tunnels)).await.unwrap();
    assert!(proxy.ended().await.success());
    assert!(clock::now().duration_since(begin) >= DRAIN);
    let said = proxy.said();
    assert_eq!(said.matches("--of-a-later-version").count(), 1, "{said}");
}

#[tokio::test]
async fn what_cannot_work_ends_the_start_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let pod = [("POD_NAME", "w"), ("POD_NAMESPACE", "app"), ("SERVICE_ACCOUNT", "w")];
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let config = format!(r#"{{"proxyAdminPort": {}}}"#, taken.local_addr().unwrap().port());
    type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str], &'a str);
    let cases: [Case<'_>; 5] = [
        (
            &[],
            &["router", "--domain", "d"],
            "cairn proxy: `proxy router` is not what this image does",
        ),
        (&[], &["sidecar"], "cairn proxy: `proxy sidecar` is not what this image does"),
        (
            &[("INSTANCE_IP", "x")],
            &["waypoint"],
            "cairn proxy: INSTANCE_IP=\"x\" cannot be used",
        ),
        (
            &[("INSTANCE_IP", "127.0.0.1"), ("PROXY_CONFIG", "{")],
            &["waypoint"],
            "cairn proxy: PROXY_CONFIG cannot be read as JSON or YAML",
        ),
        (
            &[("INSTANCE_IP", "127.0.0.1"), ("PROXY_CONFIG", &config)],
            &["waypoint", "--log_output_level", "off"],
            "cairn proxy: the port for administration (ProxyConfig.proxyAdminPort) cannot be opened at 127.0.0.1:",
        ),
    ];
    for (variables, arguments, want) in cases {
        let variables: Vec<_> = pod.into_iter().chain(variables.iter().copied()).collect();
        let mut proxy = Proxy::start(folder.path(), &variables, arguments);
        assert_eq!(proxy.ended().await.code(), Some(1), "{arguments:?}");
        let said = proxy.said();
        assert!(said.starts_with(want) && said.lines().count() == 1, "{said}");
    }
}
