//! `cairn demo`: a small mesh on this machine, for a newcomer without a cluster.
//!
//! A generated certificate authority, two versions of an application in pods on loopback addresses, the waypoint of `cairn run` and of the
//! pod, and entrances that play the client's ztunnel. The configuration is what istiod made of `examples/demo.yaml`. Each request
//! is told in one line; `--check` asks for everything itself and says whether the answers are right.

mod capture;
mod check;
mod client;
mod echo;
mod entrance;
mod mesh;
mod pod;
mod told;

use std::{
    io::{self, ErrorKind, Write as _},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use entrance::Place;
use mesh::{Mesh, Settings};
use tokio::signal::unix::{SignalKind, signal};
use told::Paint;

/// How long the end may take.
const END: Duration = Duration::from_secs(2);

/// Runs a small mesh on this machine.
#[derive(Args, Debug)]
pub struct Demo {
    /// Sends the requests of the demonstration, shows whether each answer is right, and ends.
    #[arg(long)]
    check: bool,
    /// Where the shop can be entered; the next four ports lead to its HTTP/2 and TCP ports, the vault, and an address that is nobody's.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// The mesh's addresses are 127.N.x.x; choose another digit to run several.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..10))]
    loopback: u8,
    /// A folder with istiod's answers, instead of those that are built in.
    #[arg(long, value_name = "DIR")]
    config: Option<PathBuf>,
}

/// Why the mesh does not come up.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration.
    #[error(transparent)]
    Capture(#[from] capture::CaptureError),
    /// The configuration lacks something.
    #[error("the configuration is not complete, so nothing would be served: {0} did not come. Capture examples/demo.yaml again")]
    Incomplete(String),
    /// A pod that cannot be here.
    #[error(
        "the configuration has an endpoint at {address} (cluster {cluster}), which is not an address of this machine: give the pods \
         of the manifests addresses in 127.0.1.0/24, as in examples/demo.yaml, and capture again; or serve it with `cairn run`"
    )]
    Elsewhere {
        /// Whose endpoint.
        cluster: String,
        /// Where it is.
        address: SocketAddr,
    },
    /// A pod that the mesh does not know.
    #[error(
        "the configuration has an endpoint at {0} but no workload with that address: capture wds.pb together with the other files"
    )]
    Nobody(IpAddr),
    /// A certificate.
    #[error("no certificates can be made: {0}")]
    Identity(String),
    /// The ports after the first entrance.
    #[error("--listen {0} leaves no ports for the other four entrances: choose a port below 65532")]
    PortTooHigh(SocketAddr),
    /// A port or an address.
    #[error("cannot listen on {address} for {what}: {error}. {remedy}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What for.
        what: &'static str,
        /// Why not.
        error: &'static str,
        /// What to do.
        remedy: String,
    },
    /// Anything else of the system.
    #[error("{what}: {error}")]
    System {
        /// What for.
        what: String,
        /// Why not.
        error: io::Error,
    },
}

/// Runs until a signal ends it, or all requests are answered.
pub fn main(args: &Demo) -> ExitCode {
    match demonstrate(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cairn demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demonstrate(args: &Demo) -> Result<bool, StartError> {
    let system = |what: &str| {
        let what = what.to_owned();
        move |error| StartError::System { what, error }
    };
    let paint = Paint::for_stdout();
    let settings = Settings {
        listen: args.listen,
        octet: args.loopback,
        config: args.config.clone(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(system("no threads can be started"))?;
    let right = runtime.block_on(async {
        let mut mesh = Mesh::start(&settings)?;
        let mut interrupted = signal(SignalKind::interrupt()).map_err(system("Ctrl-C cannot be waited for"))?;
        let mut terminated = signal(SignalKind::terminate()).map_err(system("SIGTERM cannot be waited for"))?;
        let run = async {
            if args.check {
                let outcomes = check::run(&mut mesh).await;
                print(&check::table(&outcomes, paint));
                check::all_right(&outcomes)
            } else {
                print(&introduction(&mesh, paint));
                while let Some(told) = mesh.told.recv().await {
                    print(&format!("{}\n", told.line(paint)));
                }
                true
            }
        };
        Ok(tokio::select! {
            right = run => right,
            _ = interrupted.recv() => !args.check,
            _ = terminated.recv() => !args.check,
        })
    });
    runtime.shutdown_timeout(END);
    right
}

/// Prints; a reader that has gone away misses nothing.
fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// What runs, and what to try.
fn introduction(mesh: &Mesh, paint: Paint) -> String {
    let at = |place| mesh.entrance(place).map(|address| address.to_string()).unwrap_or_default();
    let [shop, http2, tcp, vault, nobody] = Place::ALL.map(at);
    let pods: Vec<String> = mesh
        .pods
        .iter()
        .map(|(name, address)| format!("{name} {}", address.ip()))
        .collect();
    let mut text = format!(
        "{}: a mesh on this machine, on the configuration that istiod made of examples/demo.yaml\n  waypoint  {}, tunnels with \
         mutual TLS in and out\n  pods      {}\n  entrance  http://{shop} plays the client's ztunnel\n",
        paint.bold("cairn demo"),
        mesh.waypoint,
        pods.join(", "),
    );
    for refused in &mesh.refused {
        text.push_str(&format!("  {}  {refused}\n", paint.bad("refuses ")));
    }
    text.push_str("try\n");
    for (command, shows) in [
        (format!("curl http://{shop}/"), "four in five answers are by v1, one by v2"),
        (format!("curl -H 'x-version: v2' http://{shop}/"), "a header chooses v2"),
        (format!("curl http://{shop}/api/cart"), "the application is asked for /cart"),
        (format!("curl -i http://{shop}/old/page"), "a redirect"),
        (format!("curl -i http://{shop}/slow"), "a timeout after 300 ms"),
        (
            format!("curl -i http://{shop}/broken"),
            "a route to a service that does not exist",
        ),
        (format!("curl --http2-prior-knowledge http://{http2}/"), "HTTP/2 all the way"),
        (
            format!("echo hello | curl -s -m 1 telnet://{tcp}"),
            "a TCP port sends back what it gets",
        ),
        (format!("curl -i http://{vault}/"), "visitors are not let in"),
        (format!("curl http://{nobody}/"), "an address that is nobody's"),
    ] {
        text.push_str(&format!("  {command:<54}  {}\n", paint.dim(shows)));
    }
    text.push_str(&format!(
        "each request is told below; Ctrl-C ends everything\n\n{}\n",
        paint.dim("who  what  answer  route  → endpoint  time  why")
    ));
    text
}

// === impl StartError ===

impl StartError {
    /// An entrance cannot be opened.
    fn entrance(address: SocketAddr, error: io::Error) -> Self {
        let port = if address.port() < 9000 { 9090 } else { 8080 };
        let remedy = format!("Choose another first port, such as --listen 127.0.0.1:{port}: five ports from there on are used");
        Self::listen(address, "requests", error, remedy)
    }

    /// A pod cannot listen.
    fn pod(address: SocketAddr, error: io::Error) -> Self {
        Self::listen(address, "a pod's tunnels", error, another(address))
    }

    /// The waypoint cannot listen.
    fn waypoint(address: SocketAddr, error: io::Error) -> Self {
        Self::listen(address, "the waypoint's tunnels", error, another(address))
    }

    fn listen(address: SocketAddr, what: &'static str, error: io::Error, remedy: String) -> Self {
        match error.kind() {
            ErrorKind::AddrInUse => Self::Listen {
                address,
                what,
                error: "another program listens there",
                remedy,
            },
            ErrorKind::PermissionDenied => Self::Listen {
                address,
                what,
                error: "this user may not",
                remedy,
            },
            ErrorKind::AddrNotAvailable if address.ip().is_loopback() => {
                let remedy = format!(
                    "Linux has all of 127.0.0.0/8; elsewhere add it: sudo ifconfig lo0 alias {}",
                    address.ip()
                );
                Self::Listen {
                    address,
                    what,
                    error: "this machine does not have the address",
                    remedy,
                }
            }
            ErrorKind::AddrNotAvailable => Self::Listen {
                address,
                what,
                error: "this machine does not have the address",
                remedy,
            },
            _ => Self::System {
                what: format!("cannot listen on {address} for {what}"),
                error,
            },
        }
    }
}

/// The remedy for an address of the mesh that is taken.
fn another(address: SocketAddr) -> String {
    let digit = match address.ip() {
        IpAddr::V4(address) => address.octets()[1],
        IpAddr::V6(_) => 0,
    };
    format!(
        "End it, or run the mesh on other addresses with --loopback {}",
        (digit + 1) % 10
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_comes_with_the_remedy() {
        let in_use = || io::Error::from(ErrorKind::AddrInUse);
        for (error, sentence) in [
            (
                StartError::entrance("127.0.0.1:8080".parse().unwrap(), in_use()),
                "cannot listen on 127.0.0.1:8080 for requests: another program listens there. Choose another first port, such as \
                 --listen 127.0.0.1:9090: five ports from there on are used",
            ),
            (
                StartError::waypoint("127.0.0.1:15008".parse().unwrap(), in_use()),
                "cannot listen on 127.0.0.1:15008 for the waypoint's tunnels: another program listens there. End it, or run the mesh \
                 on other addresses with --loopback 1",
            ),
            (
                StartError::pod(
                    "127.0.1.11:15008".parse().unwrap(),
                    io::Error::from(ErrorKind::AddrNotAvailable),
                ),
                "cannot listen on 127.0.1.11:15008 for a pod's tunnels: this machine does not have the address. Linux has all of \
                 127.0.0.0/8; elsewhere add it: sudo ifconfig lo0 alias 127.0.1.11",
            ),
        ] {
            assert_eq!(error.to_string(), sentence);
        }
    }
}
