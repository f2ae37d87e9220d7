//! A cluster of network namespaces: a bridge in one of its own, and a namespace for each pod with real redirection.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use cairn_exchange::clock;
use cairn_hbone::{Pool, PoolSettings, TcpTls};
use cairn_identity::{ClientTerms, Identity, peer_id};
use cairn_ztunnel::{netns::Namespace, sockets::Sockets};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The network; everything in it is gone when it is dropped.
pub struct Net {
    prefix: String,
    pub folder: tempfile::TempDir,
    children: Vec<Child>,
    spaces: Vec<String>,
}

/// Which tool redirects.
#[derive(Clone, Copy)]
pub enum Capture {
    None,
    Nftables,
    Iptables,
}

/// A pod's namespace.
#[derive(Clone)]
pub struct Pod {
    pub space: String,
    pub ip: IpAddr,
    pub namespace: Namespace,
}

impl Net {
    pub fn new() -> Self {
        let prefix = format!("zt{}x{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let mut net = Self {
            prefix,
            folder: tempfile::tempdir().unwrap(),
            children: Vec::new(),
            spaces: Vec::new(),
        };
        let hub = net.space("hub");
        run(&format!("ip -n {hub} link add br0 type bridge"));
        run(&format!("ip -n {hub} addr add {}/24 dev br0", hub_ip()));
        run(&format!("ip -n {hub} link set br0 up"));
        net
    }

    fn space(&mut self, name: &str) -> String {
        let space = format!("{}{name}", self.prefix);
        run(&format!("ip netns add {space}"));
        run(&format!("ip -n {space} link set lo up"));
        self.spaces.push(space.clone());
        space
    }

    /// Something at the hub's address.
    pub fn hub(&self) -> Namespace {
        namespace(&format!("{}hub", self.prefix))
    }

    /// A pod with this last part of its address.
    pub fn pod(&mut self, name: &str, number: u8, capture: Capture) -> Pod {
        let space = self.space(name);
        let hub = format!("{}hub", self.prefix);
        run(&format!(
            "ip -n {hub} link add v{number} type veth peer name eth0 netns {space}"
        ));
        run(&format!("ip -n {hub} link set v{number} master br0 up"));
        let ip = Ipv4Addr::new(10, 99, 0, number);
        run(&format!("ip -n {space} addr add {ip}/24 dev eth0"));
        run(&format!("ip -n {space} link set eth0 up"));
        run(&format!("ip -n {space} route add default via {}", hub_ip()));
        for setting in ["all", "default", "lo", "eth0"] {
            run(&format!(
                "ip netns exec {space} sysctl -qw net.ipv4.conf.{setting}.rp_filter=0"
            ));
        }
        match capture {
            Capture::None => {}
            Capture::Nftables => nftables(&space),
            Capture::Iptables => iptables(&space),
        }
        if !matches!(capture, Capture::None) {
            run(&format!("ip -n {space} rule add fwmark 0x111/0xfff pref 32764 lookup 100"));
            run(&format!("ip -n {space} route add local 0.0.0.0/0 dev lo table 100"));
        }
        Pod {
            namespace: namespace(&space),
            space,
            ip: ip.into(),
        }
    }

    /// Runs the proxy in a namespace.
    pub fn ztunnel(&mut self, space: &str, environment: &[(&str, &str)]) -> PathBuf {
        let token = self.folder.path().join("token");
        std::fs::write(&token, "token").unwrap();
        let log = self.folder.path().join(format!("{space}-{}.log", self.children.len()));
        let out = File::create(&log).unwrap();
        let istiod = format!("http://{}:15010", hub_ip());
        let child = Command::new("ip")
            .args([
                "netns",
                "exec",
                space,
                env!("CARGO_BIN_EXE_cairn-ztunnel"),
                "proxy",
                "ztunnel",
            ])
            .env("XDS_ADDRESS", &istiod)
            .env("CA_ADDRESS", &istiod)
            .env("AUTH_TOKEN", &token)
            .env("PACKET_MARK", "1337")
            .env("RUST_LOG", "info,cairn_ztunnel=debug")
            .envs(environment.iter().copied())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.children.push(child);
        log
    }

    /// Asks the proxies that were started to end; `ip netns exec` is the proxy by then.
    pub fn signal(&self, index: usize) {
        let id = rustix::process::Pid::from_child(&self.children[index]);
        rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
    }

    /// Whether one has ended.
    pub fn has_ended(&mut self, index: usize) -> bool {
        self.children[index].try_wait().unwrap().is_some()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let mut logs: Vec<_> = std::fs::read_dir(self.folder.path())
                .unwrap()
                .flatten()
                .map(|entry| entry.path())
                .collect();
            logs.sort();
            for log in logs.iter().filter(|path| path.extension().is_some_and(|ext| ext == "log")) {
                eprintln!("--- {}\n{}", log.display(), std::fs::read_to_string(log).unwrap_or_default());
            }
        }
        for space in &self.spaces {
            run(&format!("ip netns del {space}"));
        }
    }
}

pub fn hub_ip() -> Ipv4Addr {
    Ipv4Addr::new(10, 99, 0, 254)
}

fn namespace(space: &str) -> Namespace {
    Namespace::of(File::open(format!("/run/netns/{space}")).unwrap().into()).unwrap()
}

fn run(line: &str) {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What istio-cni's rules do, in the words of nftables; but what goes to istiod is left alone, since a dedicated proxy asks from here.
fn nftables(space: &str) {
    let rules = "
        table inet zt {
            chain mark_in { type filter hook prerouting priority mangle; meta mark & 0xfff == 0x539 ct mark set 0x111; }
            chain mark_out { type route hook output priority mangle; ct mark & 0xfff == 0x111 meta mark set 0x111; }
            chain inbound { type nat hook prerouting priority dstnat;
                ip daddr != 127.0.0.1 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006; }
            chain outbound { type nat hook output priority -100;
                tcp dport 15010 return;
                meta mark & 0xfff == { 0x539, 0x111 } return;
                oifname != lo udp dport 53 redirect to :15053;
                ip daddr != 127.0.0.1 meta l4proto tcp redirect to :15001; }
        }";
    let file = std::env::temp_dir().join(format!("{space}.nft"));
    std::fs::write(&file, rules).unwrap();
    run(&format!("ip netns exec {space} nft -f {}", file.display()));
    std::fs::remove_file(&file).unwrap();
}

/// The same in the words of iptables.
fn iptables(space: &str) {
    for rule in [
        "-t mangle -A PREROUTING -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff",
        "-t mangle -A OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff",
        "-t nat -A PREROUTING ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006",
        "-t nat -A OUTPUT ! -o lo -p udp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053",
        "-t nat -A OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT",
        "-t nat -A OUTPUT -p tcp --dport 15010 -j ACCEPT",
        "-t nat -A OUTPUT ! -d 127.0.0.1/32 -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001",
    ] {
        run(&format!("ip netns exec {space} iptables {rule}"));
    }
}

impl Pod {
    fn sockets(&self) -> Sockets {
        Sockets {
            namespace: self.namespace.clone(),
            mark: None,
            keep_source: false,
        }
    }

    /// An application that greets with its client's address and repeats every line.
    pub fn echo(&self, port: u16) {
        let listener = self.listen(port);
        tokio::spawn(async move {
            loop {
                let (stream, client) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let (read, mut write) = stream.into_split();
                    let _ = write.write_all(format!("{}\n", client.ip()).as_bytes()).await;
                    let mut lines = BufReader::new(read).lines();
                    while let Ok(Some(line)) = lines.next_line().await {
                        if write.write_all(format!("{line}\n").as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
    }

    pub fn listen(&self, port: u16) -> TcpListener {
        let listener = self.namespace.run(|| std::net::TcpListener::bind(("0.0.0.0", port))).unwrap();
        listener.set_nonblocking(true).unwrap();
        TcpListener::from_std(listener).unwrap()
    }

    /// Tunnels from this pod by somebody who is no proxy of ours and believes every peer of the mesh.
    pub fn tunnels(&self, identity: Identity) -> Pool {
        let sockets = self.sockets();
        let dial = TcpTls::new(
            move |_| {
                let terms = ClientTerms::hbone(["spiffe://"]);
                identity.try_client_config(&terms).map_err(|error| error.to_string())
            },
            |_, certificates| peer_id(certificates).map(Some).map_err(|error| error.to_string()),
        )
        .over(move |destination| {
            let (sockets, to) = (sockets.clone(), destination.address);
            Box::pin(async move { sockets.connect(to, None).await })
        });
        Pool::new(PoolSettings::default(), dial)
    }

    pub async fn connect(&self, to: &str) -> io::Result<TcpStream> {
        timeout(PATIENCE, self.sockets().connect(to.parse().unwrap(), None))
            .await
            .unwrap()
    }

    /// Connects, says a line, and hears the greeting and the line.
    pub async fn say(&self, to: &str, line: &str) -> io::Result<(Line, String)> {
        let stream = self.connect(to).await?;
        let mut stream = Line(BufReader::new(stream));
        let greeting = stream.hear().await?;
        assert_eq!(stream.say(line).await?, line);
        Ok((stream, greeting))
    }

    /// As [`Pod::say`], again and again until it works.
    pub async fn say_eventually(&self, to: &str, line: &str) -> (Line, String) {
        let begin = clock::now();
        loop {
            match self.say(to, line).await {
                Ok(said) => return said,
                Err(error) if begin.elapsed() < PATIENCE => {
                    tracing::debug!("again: {error}");
                    sleep(Duration::from_millis(100)).await;
                }
                Err(error) => panic!("{to}: {error}"),
            }
        }
    }

    /// A page of the proxy in this namespace, by a plain request; status and body.
    pub async fn page(&self, port: u16, path: &str) -> (String, String) {
        let begin = clock::now();
        loop {
            let asked = async {
                let mut stream = self
                    .namespace
                    .run(|| std::net::TcpStream::connect(("127.0.0.1", port)))
                    .and_then(|stream| {
                        stream.set_nonblocking(true)?;
                        TcpStream::from_std(stream)
                    })?;
                let (method, path) = path.split_once(' ').unwrap_or(("GET", path));
                let head = format!("{method} {path} HTTP/1.0\r\nhost: x\r\ncontent-length: 0\r\n\r\n");
                stream.write_all(head.as_bytes()).await?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer).await?;
                io::Result::Ok(answer)
            };
            match asked.await {
                Ok(answer) => {
                    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
                    return (head.lines().next().unwrap().to_owned(), body.to_owned());
                }
                Err(_) if begin.elapsed() < PATIENCE => sleep(Duration::from_millis(50)).await,
                Err(error) => panic!("{path}: {error}"),
            }
        }
    }

    /// Waits until the proxy in this namespace is ready.
    pub async fn ready(&self) {
        let begin = clock::now();
        loop {
            let (status, body) = self.page(15021, "/healthz/ready").await;
            if status.contains("200") {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "{body}");
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Lines over a connection.
pub struct Line(pub BufReader<TcpStream>);

impl Line {
    pub async fn hear(&mut self) -> io::Result<String> {
        let mut line = String::new();
        let read = timeout(PATIENCE, self.0.read_line(&mut line)).await.unwrap()?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }

    pub async fn say(&mut self, line: &str) -> io::Result<String> {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).await?;
        self.hear().await
    }

    /// How it ends, and after how long.
    pub async fn end(&mut self) -> (io::Result<usize>, Duration) {
        let begin = clock::now();
        let ended = timeout(PATIENCE, self.0.read(&mut [0; 1])).await.unwrap();
        (ended, begin.elapsed())
    }
}

/// Waits until a file holds something.
pub async fn until_logged(path: &Path, words: &[&str]) -> String {
    let begin = clock::now();
    loop {
        let text = std::fs::read_to_string(path).unwrap();
        if let Some(line) = text.lines().find(|line| words.iter().all(|word| line.contains(word))) {
            return line.to_owned();
        }
        assert!(begin.elapsed() < PATIENCE, "no line with {words:?} in {text}");
        sleep(Duration::from_millis(20)).await;
    }
}

pub fn address(ip: IpAddr, port: u16) -> String {
    SocketAddr::new(ip, port).to_string()
}
