//! Builds the decapsulator and hands its object to `migrate`.

fn main() {
    ebpf_build::build("decapsulate");
}
