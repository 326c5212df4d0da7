//! The core on the host: tables in ordinary memory and frames in vectors, for tests, simulations and
//! benchmarks. Feature `host`; the kernel program is built without it.

pub mod frame;
pub mod tables;
pub mod tunnel;

pub use frame::{Frame, FrameBuilder, Segment};
pub use tables::HostTables;
pub use tunnel::{HostTunnels, Outer};
