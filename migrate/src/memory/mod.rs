//! The memory of a workload: it is taken and brought by the agents, not by CRIU, which writes every page to a file and
//! reads every page from one while the workload stands still.
//!
//! * [`layout`]: CRIU's dump without pages, and what takes their place in the images.
//! * [`read`]: reading the memory of tasks.
//! * [`ahead`]: memory that goes over while its server runs (pre-copy).
//!
//! Pages that come after the restore (post-copy):
//!
//! * [`wire`]: questions and answers; [`mod@line`]: the target's end of a stream of them; [`serve`]: the source's.
//! * [`pager`]: the process that brings pages to the restored tasks; [`restorer`]: what CRIU tells it.
//! * [`space`]: which pages a task lacks; [`uffd`]: userfaultfd(2); [`window`]: how much is asked for ahead.
//! * [`guard`]: what keeps a workload from reading zeros if its pager dies.

pub mod ahead;
pub mod guard;
pub mod layout;
pub mod line;
pub mod pager;
pub mod read;
pub mod restorer;
pub mod serve;
pub mod space;
pub mod uffd;
pub mod window;
pub mod wire;
