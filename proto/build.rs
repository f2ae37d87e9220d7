//! Generates the messages from `descriptors.binpb`: no `protoc` is needed to build.

use std::{env, fs, path::PathBuf};

use prost::Message as _;
use prost_types::FileDescriptorSet;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=descriptors.binpb");
    // Cargo names the folder for build scripts this way only.
    #[allow(clippy::disallowed_methods)]
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut set = FileDescriptorSet::decode(fs::read("descriptors.binpb")?.as_slice())?;
    // Comments of other projects are not documentation of ours, and rustdoc would try to run them as tests.
    for file in &mut set.file {
        file.source_code_info = None;
    }
    tonic_prost_build::configure()
        .build_server(true)
        .build_transport(false)
        .btree_map(".")
        .bytes(".google.protobuf.Any")
        .include_file("messages.rs")
        .out_dir(out)
        .compile_fds(set)?;
    Ok(())
}
