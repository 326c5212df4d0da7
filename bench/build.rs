//! Builds the wrapper that packets are measured with.

fn main() {
    ebpf_build::build("bench-wrapper");
}
