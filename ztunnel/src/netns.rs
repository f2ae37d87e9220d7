//! Network namespaces of pods, and doing something inside of one.
//!
//! A socket belongs to the namespace in which it was made, whoever uses it. So a thread enters a pod's namespace for the time of one
//! call and comes back; nothing else ever runs there.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace: our own, or a pod's.
#[derive(Clone, Debug, Default)]
pub struct Namespace(Option<Arc<Pod>>);

#[derive(Debug)]
struct Pod {
    fd: OwnedFd,
    home: OwnedFd,
    inode: u64,
}

// === impl Namespace ===

impl Namespace {
    /// The one that this process was started in.
    pub fn own() -> Self {
        Self(None)
    }

    /// The one behind a file descriptor, as `/proc/PID/ns/net`. Entered once, so that what is no namespace is refused here.
    pub fn of(fd: OwnedFd) -> io::Result<Self> {
        let inode = rustix::fs::fstat(&fd)?.st_ino;
        let home = File::open("/proc/thread-self/ns/net")?.into();
        let namespace = Self(Some(Arc::new(Pod { fd, home, inode })));
        namespace.run(|| Ok(()))?;
        Ok(namespace)
    }

    /// The same number means the same namespace; none is our own.
    pub fn inode(&self) -> Option<u64> {
        self.0.as_ref().map(|pod| pod.inode)
    }

    /// Runs `make` inside, on this thread. It has to be short, and must not wait.
    pub fn run<T>(&self, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let Some(pod) = &self.0 else { return make() };
        move_into_link_name_space(pod.fd.as_fd(), Some(LinkNameSpaceType::Network))?;
        let made = make();
        if let Err(error) = move_into_link_name_space(pod.home.as_fd(), Some(LinkNameSpaceType::Network)) {
            // Every socket that this thread makes from now on would be a stranger's: no work can go on.
            tracing::error!("a thread cannot come back from a pod's network namespace, so the process ends: {error}");
            std::process::abort();
        }
        made
    }
}
