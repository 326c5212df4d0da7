//! The lab itself: its plain topology carries traffic, labs do not meet, and nothing stays behind.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping, in its helpers too")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::process::Process;
use lab::{Lab, Namespace, Site, address, wait_for};

const LIMIT: Duration = Duration::from_secs(5);

/// Sends bytes by TCP and by UDP from one namespace to an address of another and back.
fn assert_carries(from: &Namespace, to: &Namespace, address: IpAddr, client_seen: Option<IpAddr>) {
    let at = SocketAddr::new(address, 0);
    let listener = to.run(|| TcpListener::bind(at)).unwrap();
    let server = listener.local_addr().unwrap();
    let echo = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
        peer.ip()
    });
    let mut stream = from.run(|| TcpStream::connect_timeout(&server, LIMIT)).expect("a TCP connection");
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).expect("an answer over TCP");
    assert_eq!(&answer, b"hello");
    let peer = echo.join().unwrap();

    let server = to.run(|| UdpSocket::bind(at)).unwrap();
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let client = from.run(|| UdpSocket::bind(any)).unwrap();
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(LIMIT)).unwrap();
    }
    client.send_to(b"hello", server.local_addr().unwrap()).unwrap();
    let mut bytes = [0; 9];
    let (length, sender) = server.recv_from(&mut bytes).expect("a UDP packet");
    server.send_to(&bytes[..length], sender).unwrap();
    let (length, answerer) = client.recv_from(&mut bytes).expect("an answer over UDP");
    assert_eq!((&bytes[..length], answerer.ip()), (&b"hello"[..], address));

    for seen in [peer, sender.ip()] {
        assert!(client_seen.is_none_or(|expected| expected == seen), "the server saw {seen}");
    }
}

#[test]
fn links_carry_traffic_of_both_families() {
    let lab = Lab::new().unwrap();
    assert_carries(lab.client(), lab.lb(), address::LB4.into(), Some(address::CLIENT4.into()));
    assert_carries(lab.client(), lab.lb(), address::LB6.into(), Some(address::CLIENT6.into()));
    assert_carries(lab.client(), lab.lb(), address::VIRTUAL4.into(), None);
    assert_carries(lab.client(), lab.lb(), address::VIRTUAL6.into(), None);
    for site in Site::ALL {
        assert_carries(
            lab.lb(),
            lab.site(site),
            address::site4(site).into(),
            Some(address::lb_at4(site).into()),
        );
        assert_carries(
            lab.lb(),
            lab.site(site),
            address::site6(site).into(),
            Some(address::lb_at6(site).into()),
        );
        // Without a source of its own, what a site sends carries the backend's address, to which lb has no route.
        lab.route(address::backend4(1).into(), site).unwrap();
        lab.route(address::backend6(1).into(), site).unwrap();
        assert_carries(lab.site(site), lab.lb(), address::LB4.into(), Some(address::backend4(1).into()));
        assert_carries(lab.site(site), lab.lb(), address::LB6.into(), Some(address::backend6(1).into()));
    }
}

#[test]
fn plain_routing_reaches_a_backend_where_its_route_points() {
    let lab = Lab::new().unwrap();
    let backends = |number| [IpAddr::from(address::backend4(number)), address::backend6(number).into()];
    let connect = |to| lab.client().run(|| TcpStream::connect_timeout(&SocketAddr::new(to, 9), LIMIT));
    let unreachable =
        connect(address::backend4(1).into()).expect_err("lb has no routes to backends by itself");
    assert!(unreachable.kind() != std::io::ErrorKind::ConnectionRefused, "{unreachable}");
    for address in (1..=address::BACKENDS).flat_map(backends) {
        for site in Site::ALL {
            lab.route(address, site).unwrap();
            assert_carries(lab.client(), lab.site(site), address, None);
        }
    }
}

#[test]
fn veths_send_whole_frames_and_peers_take_redirected_ones() {
    let lab = Lab::new().unwrap();
    let feature = |namespace: &Namespace, device: &str, name: &str| {
        let output = namespace.command("ethtool").args(["-k", device]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line =
            text.lines().find_map(|line| line.trim().strip_prefix(&format!("{name}: ")).map(str::to_owned));
        line.unwrap_or_else(|| panic!("{device} has no feature {name}:\n{text}"))
    };
    for device in ["c0", "a0", "b0"] {
        for name in ["tx-checksumming", "tcp-segmentation-offload", "generic-receive-offload"] {
            assert_eq!(feature(lab.lb(), device, name), "off", "{device} {name}");
        }
    }
    for namespace in [lab.client(), lab.site(Site::A), lab.site(Site::B)] {
        assert_eq!(feature(namespace, "eth0", "tx-checksumming"), "off");
        assert_eq!(feature(namespace, "eth0", "generic-receive-offload"), "on");
    }
}

#[test]
fn several_labs_stand_at_once() {
    let labs: Vec<Lab> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| Lab::new().unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    // The same address and port in each: a namespace of another lab would answer with another number.
    let server = SocketAddr::from((address::LB4, 7));
    for (number, lab) in labs.iter().enumerate() {
        let listener = lab.lb().run(|| TcpListener::bind(server)).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&[u8::try_from(number).unwrap()]).unwrap();
        });
    }
    for (number, lab) in labs.iter().enumerate() {
        let mut stream = lab.client().run(|| TcpStream::connect_timeout(&server, LIMIT)).unwrap();
        let mut answer = [0];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(usize::from(answer[0]), number);
    }
}

#[test]
fn a_lab_is_made_in_well_under_a_second() {
    let fastest = (0..3)
        .map(|_| {
            let start = Instant::now();
            let lab = Lab::new().unwrap();
            let made = start.elapsed();
            drop(lab);
            made
        })
        .min()
        .unwrap();
    assert!(fastest < Duration::from_secs(1), "{fastest:?}");
}

/// Paths that bear a lab's identity: namespaces, pins, scratch folder.
fn traces(lab: &str) -> Vec<String> {
    ["/run/netns", "/sys/fs/bpf", "/dev/shm", "/run", "/tmp"]
        .into_iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flatten()
        .map(|entry| entry.unwrap().path().display().to_string())
        .filter(|path| path.contains(lab))
        .collect()
}

fn is_running(pid: u32) -> bool {
    // A killed process whose parent has not asked for its end yet is a zombie, which holds nothing.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// `drover-PID-START-NUMBER`
fn identity(lab: &Lab) -> String {
    lab.dir().file_name().unwrap().to_str().unwrap().to_owned()
}

/// What a lab can hold: a process of ours, one that has left its parent, a pin, a mount in the scratch folder.
fn fill(lab: &Lab) -> [u32; 2] {
    let mut sleep = lab.site(Site::A).command("sleep");
    sleep.arg("1000");
    let process = Process::spawn("sleep", lab.dir(), sleep).unwrap();
    let bound = process.pid();
    std::mem::forget(process);

    let mut shell = lab.site(Site::B).command("setsid");
    shell.args(["--fork", "unshare", "--pid", "--fork", "--mount-proc", "sh", "-c"]);
    shell.arg("echo started; exec sleep 1000").stdout(Stdio::piped()).process_group(0);
    let mut started = String::new();
    let mut output = std::io::BufReader::new(shell.spawn().unwrap().stdout.unwrap());
    std::io::BufRead::read_line(&mut output, &mut started).unwrap();
    assert_eq!(started, "started\n");
    let pids = Command::new("ip").args(["netns", "pids", lab.site(Site::B).name()]).output().unwrap().stdout;
    let pids = String::from_utf8(pids).unwrap();
    let detached = pids.lines().last().expect("a process in the site").trim().parse().unwrap();

    std::fs::create_dir(lab.pin_path()).unwrap();
    let map = lab.pin_path().join("folder");
    std::fs::create_dir(map).unwrap();
    let mount = lab.dir().join("mount");
    std::fs::create_dir(&mount).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "lab-test"]).arg(&mount).status().unwrap();
    assert!(mounted.success());
    assert!(is_running(bound) && is_running(detached));
    [bound, detached]
}

#[test]
fn nothing_stays_after_drop() {
    let lab = Lab::new().unwrap();
    let identity = identity(&lab);
    let pids = fill(&lab);
    assert_eq!(traces(&identity).len(), 4 + 1 + 1, "{:?}", traces(&identity));
    drop(lab);
    assert_eq!(traces(&identity), Vec::<String>::new());
    assert_eq!(pids.map(is_running), [false, false]);
}

#[test]
fn nothing_stays_after_a_panic() {
    let (report, reported) = std::sync::mpsc::channel();
    let test = std::thread::spawn(move || {
        let lab = Lab::new().unwrap();
        report.send((identity(&lab), fill(&lab))).unwrap();
        panic!("as a failing test does");
    });
    let (identity, pids) = reported.recv().unwrap();
    assert!(test.join().is_err());
    assert_eq!(traces(&identity), Vec::<String>::new());
    assert_eq!(pids.map(is_running), [false, false]);
}

/// Not a test: what [`the_next_lab_removes_what_a_killed_process_left`] starts and kills.
#[test]
#[ignore = "makes a lab and waits to be killed"]
fn make_a_lab_and_wait() {
    let lab = Lab::new().unwrap();
    let [bound, detached] = fill(&lab);
    println!("\nlab {} {bound} {detached}", identity(&lab));
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn the_next_lab_removes_what_a_killed_process_left() {
    let mut creator = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "make_a_lab_and_wait"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = std::io::BufReader::new(creator.stdout.take().unwrap());
    let line =
        std::io::BufRead::lines(output).map(|line| line.unwrap()).find(|line| line.starts_with("lab "));
    let line = line.expect("the creator says what it made");
    let parts: Vec<_> = line.split(' ').collect();
    let (identity, pids) = (parts[1], [parts[2], parts[3]].map(|pid| pid.parse::<u32>().unwrap()));

    lab::sweep().unwrap();
    assert_eq!(traces(identity).len(), 6, "a lab whose creator lives is left alone");
    creator.kill().unwrap();
    creator.wait().unwrap();
    wait_for(LIMIT, || (!is_running(pids[0])).then_some(())).expect("bound processes die with their creator");
    assert!(is_running(pids[1]));

    let _lab = Lab::new().unwrap();
    assert_eq!(traces(identity), Vec::<String>::new());
    assert!(!is_running(pids[1]));
}

#[test]
fn a_process_is_stopped_killed_and_its_log_is_kept() {
    let lab = Lab::new().unwrap();
    let spawn = |name: &str, script: &str| {
        let mut shell = lab.client().command("sh");
        shell.args(["-c", script]);
        Process::spawn(name, lab.dir(), shell).unwrap()
    };
    let mut polite = spawn("polite", "trap 'echo bye; exit 3' TERM; echo here; while :; do sleep 0.01; done");
    wait_for(LIMIT, || polite.log_tail(1).contains("here").then_some(())).unwrap();
    assert_eq!(polite.stop(LIMIT).code(), Some(3));
    assert_eq!(polite.log_tail(1), "bye");

    let mut stubborn = spawn("stubborn", "trap '' TERM; echo here; while :; do sleep 0.01; done");
    wait_for(LIMIT, || stubborn.log_tail(1).contains("here").then_some(())).unwrap();
    assert!(!stubborn.stop(Duration::from_millis(50)).success());

    let mut failing = spawn("failing", "echo no such option; exit 1");
    wait_for(LIMIT, || failing.ended()).unwrap();
    let error = failing.not_ready("is slow").to_string();
    assert!(error.contains("exit status: 1") && error.contains("no such option"), "{error}");
}

#[test]
fn a_program_that_is_not_built_is_named_with_the_command_that_builds_it() {
    let error = lab::program("no-such-program").unwrap_err().to_string();
    assert!(error.contains("cargo build -p no-such-program"), "{error}");
}
