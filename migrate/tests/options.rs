//! A workload's options: whether they are as configured, and come along.
#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::outcome::{assert_moves, assert_refused, scratch};
use common::{At, BACKEND, Client, Lab, Options, possible};

/// The workload's first process, as the agent at `at` says.
fn root_pid(lab: &Lab, at: At) -> u32 {
    let answer = lab.get(at, "/v1/workloads");
    let pid = answer.split_once("\"pid\":").unwrap().1;
    pid.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

/// Who a process is, what was set in its environment, and its control groups below `group`.
fn settings(pid: u32, group: &str) -> (String, bool, Vec<String>) {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    let status = read("status");
    let ids: Vec<_> = status.lines().filter(|line| ["Uid:", "Gid:", "Grou"].contains(&&line[..4])).collect();
    let is_set = read("environ").split('\0').any(|variable| variable == "DROVER_TEST=it is set");
    let groups =
        read("cgroup").lines().filter_map(|line| Some(line.split_once(group)?.1.to_owned())).collect();
    (ids.join(" ").replace('\t', " "), is_set, groups)
}

/// Where control groups may be, of either version.
const CGROUP_ROOTS: [&str; 4] =
    ["/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"];

/// The file of a control group's bound, wherever it is on this host.
fn bound(group: &str, files: [&str; 2]) -> String {
    let all = CGROUP_ROOTS.iter().flat_map(|root| files.map(|file| format!("{root}/{group}/{file}")));
    all.filter_map(|path| std::fs::read_to_string(path).ok()).next().unwrap_or_default().trim().to_owned()
}

/// Removes a test's control groups, which nobody is in any more.
struct Groups(String);

impl Drop for Groups {
    fn drop(&mut self) {
        for group in CGROUP_ROOTS.iter().map(|root| PathBuf::from(format!("{root}/{}", self.0))) {
            for folder in [group.join("a"), group.join("b"), group] {
                // Not every host has every one.
                let _ = std::fs::remove_dir(folder);
            }
        }
    }
}

/// Whether CRIU can dump other users' processes here.
fn may_dump_other_users() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let digits = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
    const CAP_SYS_RESOURCE: u64 = 24;
    u64::from_str_radix(digits, 16).unwrap() & (1 << CAP_SYS_RESOURCE) != 0
}

#[test]
fn a_user_comes_along_or_is_named_before_anything_is_held() {
    if !possible() {
        return;
    }
    let scratch = scratch();
    // Where anybody may run it.
    let program = scratch.path().join("counter");
    std::fs::copy(common::counter(), &program).unwrap();
    std::fs::set_permissions(scratch.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let command = Some(vec![program.to_str().unwrap().to_owned(), "10.1.0.1:7000".to_owned()]);
    let user = "user = \"54321:54322\"\n".to_owned();
    let lab = Arc::new(Lab::new(Options { command, workload: [user.clone(), user], ..Options::default() }));
    let client = Client::start(&lab);
    let ids = |at| settings(root_pid(&lab, at), "none").0;
    let expected = "Uid: 54321 54321 54321 54321 Gid: 54322 54322 54322 54322 Groups: 54322 ";
    assert_eq!(ids(At::A), expected);
    if may_dump_other_users() {
        assert_moves(&lab, &client, "there", At::A);
        assert_eq!(ids(At::B), expected);
    } else {
        let why = "runs as UID 54321, GID 54322, and CRIU may dump another user's process only with";
        assert_refused(&lab, &client, "user", why);
    }
    client.finish().unwrap();
}

#[test]
fn an_environment_and_a_control_group_come_along() {
    if !possible() {
        return;
    }
    let group = format!("drover-test-{}", std::process::id());
    let lines = |site: &str, pids_max: u32| {
        format!(
            "env = {{ DROVER_TEST = \"it is set\" }}\n[workloads.cgroup]\n\
             path = \"{group}/{site}\"\nmemory_max_mib = 256\npids_max = {pids_max}\n"
        )
    };
    // It goes after the lab.
    let _groups = Groups(group.clone());
    let lab =
        Arc::new(Lab::new(Options { workload: [lines("a", 50), lines("b", 60)], ..Options::default() }));
    let client = Client::start(&lab);
    let expected = |pid: u32, site: &str, pids_max: &str| {
        let (_, is_set, groups) = settings(pid, &format!("{group}/"));
        assert!(is_set && !groups.is_empty() && groups.iter().all(|group| group == site), "{groups:?}");
        let limits = |files| bound(&format!("{group}/{site}"), files);
        assert_eq!(limits(["memory.limit_in_bytes", "memory.max"]), (256 << 20).to_string());
        assert_eq!(limits(["pids.max", "pids.max"]), pids_max);
    };
    expected(root_pid(&lab, At::A), "a", "50");
    let none_at = |site: &str| {
        assert_eq!(
            bound(&format!("{group}/{site}"), ["pids.max", "pids.max"]),
            "",
            "the group at {site} is left"
        );
    };
    let taken = lab.inside("b", || std::net::TcpListener::bind("0.0.0.0:7000").unwrap());
    assert_refused(&lab, &client, "refused", "is taken there");
    none_at("b");
    drop(taken);
    assert_moves(&lab, &client, "there", At::A);
    expected(root_pid(&lab, At::B), "b", "60");
    none_at("a");
    assert_moves(&lab, &client, "back", At::B);
    expected(root_pid(&lab, At::A), "a", "50");
    client.finish().unwrap();
    let answer = lab.http(At::A, "POST", &format!("/v1/workloads/{BACKEND}/stop"), "");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    none_at("a");
}
