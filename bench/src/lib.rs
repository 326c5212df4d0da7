//! Drills: clients that keep a service busy while it moves, and what they saw.
//!
//! ```text
//! protocol   how a numbered message looks on the wire (pure codecs)
//! driver     one thread that sends on schedule over many connections
//! tally      what came of each message: lost, duplicated, reordered (pure)
//! timeline   a finished run: every message with its times
//! stall      what a migration cost each client, from a timeline
//! report     the drill report, as JSON
//! picture, table   the same for a terminal
//! plot       bar charts as SVG
//! scenario   the real servers that drills run against
//! probe, verify   wait until a server answers; ask it what it counted
//! server     TCP connections, and whoever answers on them
//! interrupt  Ctrl-C
//! program    where figures go, and how programs end
//! machine    what it ran on
//! ```
//!
//! The `drill` binary puts these together with a lab and the load balancer. None of them
//! knows either: they need an address to talk to and the times of the migrations.
//!
//! Beside the drill, a benchmark in each of these, with a binary of the same name:
//!
//! ```text
//! xdp        nanoseconds that the XDP program spends on a packet
//! path       what carries packets between client and server, side by side
//! moves      what clients feel of a move, by Drover and by others
//! cutover    what a flip and a replay take while the tables hold many flows
//! ```

pub mod clock;
pub mod cutover;
pub mod driver;
pub mod interrupt;
pub mod machine;
pub mod moves;
pub mod path;
pub mod picture;
pub mod plot;
pub mod probe;
pub mod program;
pub mod protocol;
pub mod report;
pub mod scenario;
pub mod server;
pub mod stall;
pub mod table;
pub mod tally;
pub mod timeline;
pub mod verify;
pub mod xdp;
