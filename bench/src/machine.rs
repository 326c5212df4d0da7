//! What a report says of the machine that it was made on.

/// The kernel's release.
pub fn kernel() -> String {
    read("/proc/sys/kernel/osrelease").trim().to_owned()
}

/// How many processors there are, and their model.
pub fn processors() -> String {
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{count} x {}", model.map_or("unknown", |(_, name)| name))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
