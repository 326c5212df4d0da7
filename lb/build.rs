//! Builds the XDP program and hands its object to `lb`.

fn main() {
    ebpf_build::build("lb-ebpf");
}
