//! Messages over a socket that keeps their borders, with file descriptors beside them.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use cairn_proto::istio::workload::zds::{
    Ack, AddWorkload, DelWorkload, KeepWorkload, Version, WorkloadInfo, WorkloadRequest, WorkloadResponse, ZdsHello,
    workload_request::Payload, workload_response,
};
use prost::Message as _;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg};
use socket2::{Domain, SockAddr, Type};
use tokio::{io::Interest, net::UnixStream};

/// The longest message that is read; the protocol's is shorter.
const MAX_MESSAGE: usize = 4096;
/// File descriptors that are taken; more than one is wrong, but must not stay open.
const MAX_FDS: usize = 8;
/// The longest error that is told.
const MAX_WORDS: usize = 512;

/// A connection. Its type is the one of streams, which knows how to wait; it is read and written message by message.
#[derive(Debug)]
pub(super) struct Socket(UnixStream);

/// What has arrived.
#[derive(Debug)]
pub struct Received {
    /// The message.
    pub bytes: Vec<u8>,
    /// What came along.
    pub fds: Vec<OwnedFd>,
}

/// What istio-cni says.
#[derive(Debug)]
pub enum Message {
    /// A pod, and its network namespace.
    Add {
        /// Its unique name.
        uid: String,
        /// Who it is.
        info: WorkloadInfo,
        /// Where it is.
        namespace: OwnedFd,
    },
    /// A pod that we have is still there.
    Keep {
        /// Its unique name.
        uid: String,
    },
    /// A pod is gone.
    Del {
        /// Its unique name.
        uid: String,
    },
    /// That was every pod there is.
    Snapshot,
}

/// Why istio-cni cannot be followed, or a message not be read.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The socket.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Longer than any message is.
    #[error("a message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// No protobuf, or none of the four.
    #[error("a message cannot be read: {0}")]
    Malformed(String),
    /// A pod without a namespace, or with several.
    #[error("the pod {uid} came with {count} file descriptors instead of one")]
    Descriptors {
        /// Whose.
        uid: String,
        /// How many.
        count: usize,
    },
}

// === impl Socket ===

impl Socket {
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket2::Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.connect(&SockAddr::unix(path)?)?;
        socket.set_nonblocking(true)?;
        UnixStream::from_std(std::os::unix::net::UnixStream::from(OwnedFd::from(socket))).map(Self)
    }

    pub(super) async fn send_hello(&self) -> io::Result<()> {
        let hello = ZdsHello {
            version: Version::V1 as i32,
        };
        self.send(&hello.encode_to_vec()).await
    }

    pub(super) async fn send_ack(&self, error: Option<&str>) -> io::Result<()> {
        let error = error.unwrap_or_default().chars().take(MAX_WORDS).collect();
        let payload = Some(workload_response::Payload::Ack(Ack { error }));
        self.send(&WorkloadResponse { payload }.encode_to_vec()).await
    }

    async fn send(&self, message: &[u8]) -> io::Result<()> {
        let send = || Ok(rustix::net::send(&self.0, message, SendFlags::NOSIGNAL)?);
        self.0.async_io(Interest::WRITABLE, send).await?;
        Ok(())
    }

    /// The next message; none at the end.
    pub(super) async fn receive(&self) -> Result<Option<Received>, WireError> {
        let received = self.0.async_io(Interest::READABLE, || receive(&self.0)).await?;
        let (received, truncated) = received;
        if truncated {
            return Err(WireError::TooLong);
        }
        Ok(Some(received).filter(|received| !received.bytes.is_empty()))
    }
}

fn receive(socket: &UnixStream) -> io::Result<(Received, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; MAX_MESSAGE];
    let result = recvmsg(
        socket.as_fd(),
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    bytes.truncate(result.bytes);
    Ok((Received { bytes, fds }, result.flags.contains(ReturnFlags::TRUNC)))
}

/// Reads a message with what came along.
pub fn read_message(bytes: &[u8], mut fds: Vec<OwnedFd>) -> Result<Message, WireError> {
    let malformed = |words: &str| WireError::Malformed(words.to_owned());
    let request = WorkloadRequest::decode(bytes).map_err(|error| WireError::Malformed(error.to_string()))?;
    match request
        .payload
        .ok_or_else(|| malformed("it says nothing that is known here"))?
    {
        Payload::Add(AddWorkload { uid, workload_info }) => {
            let (count, namespace) = (fds.len(), fds.pop());
            let Some(namespace) = namespace.filter(|_| count == 1) else {
                return Err(WireError::Descriptors { uid, count });
            };
            if uid.is_empty() {
                return Err(malformed("a pod has no uid"));
            }
            Ok(Message::Add {
                uid,
                info: workload_info.ok_or_else(|| malformed("a pod came without saying who it is"))?,
                namespace,
            })
        }
        Payload::Keep(KeepWorkload { uid }) => Ok(Message::Keep { uid }),
        Payload::Del(DelWorkload { uid }) => Ok(Message::Del { uid }),
        Payload::SnapshotSent(_) => Ok(Message::Snapshot),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn add(uid: &str, info: Option<WorkloadInfo>) -> Vec<u8> {
        let payload = Some(Payload::Add(AddWorkload {
            uid: uid.into(),
            workload_info: info,
        }));
        WorkloadRequest { payload }.encode_to_vec()
    }

    fn fds(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| File::open("/dev/null").unwrap().into()).collect()
    }

    #[test]
    fn a_message_that_is_not_whole_is_refused_in_words() {
        let info = || Some(WorkloadInfo::default());
        assert!(matches!(read_message(&add("u", info()), fds(1)), Ok(Message::Add { .. })));
        let cases = [
            (add("u", info()), 0, "0 file descriptors"),
            (add("u", info()), 2, "2 file descriptors"),
            (add("", info()), 1, "no uid"),
            (add("u", None), 1, "who it is"),
            (b"\xff\xff\xff".to_vec(), 0, "cannot be read"),
            (Vec::new(), 0, "nothing that is known"),
        ];
        for (bytes, count, words) in cases {
            let error = read_message(&bytes, fds(count)).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
