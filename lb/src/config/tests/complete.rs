//! Sites with tunnels, modes, checks, limits: what a file may say beyond the necessary.

use super::*;

#[track_caller]
fn with(from: &str, to: &str) -> Config {
    assert!(GOOD.contains(from), "{from:?} is not in the good file");
    Config::parse(&GOOD.replacen(from, to, 1), "t.toml").unwrap_or_else(|errors| panic!("{errors}"))
}

#[test]
fn hooks_limits_and_times_are_taken() {
    let config = with(
        "[datapath]",
        "[limits]\nflows = 2048\nnewcomers = 1024\nservices = 5\nbackends = 6\nmembers = 9\nsites = 7\n\
         new_flows_per_second_per_cpu = 8\nnew_flows_per_second_per_prefix = 9\n\
         [flows]\ntcp_idle_s = 1\ntcp_half_open_s = 2\ntcp_closing_s = 3\nudp_idle_s = 4\n\
         [datapath]\nhook = 'tc'",
    );
    assert_eq!(config.datapath.hook, HookChoice::Tc);
    let limits = Limits {
        flows: 2048,
        newcomers: 1024,
        services: 5,
        backends: 6,
        members: 9,
        sites: 7,
        new_flows_per_second_per_cpu: 8,
        new_flows_per_second_per_prefix: 9,
    };
    assert_eq!(config.datapath.limits, limits);
    let times = FlowTimes {
        tcp_idle: Duration::from_secs(1),
        tcp_half_open: Duration::from_secs(2),
        tcp_closing: Duration::from_secs(3),
        udp_idle: Duration::from_secs(4),
    };
    assert_eq!(config.flows, times);
    let members = with("[datapath]", "[limits]\nbackends = 6\n[datapath]").datapath.limits.members;
    assert_eq!(members, 12, "each backend in two services");
}

#[test]
fn tls_is_in_the_section_and_in_every_address_or_in_neither() {
    let section = "[tls]\nca = '/p/ca.pem'\ncertificate = '/p/lb.pem'\nkey = '/p/lb.key'\n[datapath]";
    let text = GOOD.replacen("[datapath]", section, 1);
    let secured = text.replace("http://10.2.1.1", "https://10.2.1.1");
    let config = Config::parse(&secured, "t.toml").unwrap();
    let at = config.agent_at("ams").unwrap();
    assert_eq!((at.site.as_str(), at.url.as_str()), ("ams", "https://10.2.1.1:7401"));
    assert_eq!(at.tls.unwrap().key, PathBuf::from("/p/lb.key"));
    assert_eq!(config.agent_at("fra"), None);
    for (from, to, said) in [
        ("https://", "http://", "sites[0].agent: \"http://10.2.1.1:7401/\" is without TLS"),
        ("'/p/ca.pem'", "'ca.pem'", "tls.ca: \"ca.pem\" is not an absolute path"),
        ("key = '/p/lb.key'", "", "tls.key: is missing"),
        ("key =", "password =", "tls.password: unknown field"),
    ] {
        let said_too = errors(&secured.replacen(from, to, 1)).join("\n");
        assert!(said_too.contains(said), "{said_too:?} does not say {said:?}");
    }
}

#[test]
fn hooks_limits_and_times_out_of_bounds_are_refused() {
    one("[datapath]", "[datapath]\nhook = 'driver'", "datapath.hook: \"driver\" is none of \"xdp\", \"tc\"");
    one("[datapath]", "[limits]\nflows = 5\n[datapath]", "limits.flows: 5 is outside of 1024 to 67108864");
    one("[datapath]", "[limits]\nflow = 5\n[datapath]", "limits.flow: unknown field; here may stand: flows,");
    one("[datapath]", "[flows]\nudp_idle_s = 0\n[datapath]", "flows.udp_idle_s: 0 is outside of 1 to 86400");
    let few = |what: &str| format!("[limits]\n{what} = 1\n[datapath]");
    one(
        "[datapath]",
        &few("backends"),
        "backends: 2 backends are more than the tables take: raise limits.backends (1)",
    );
    one("[datapath]", &few("services"), "raise limits.services (1)");
    one("[datapath]", &few("sites"), "raise limits.sites (1)");
    one("[datapath]", &few("members"), "2 pairs of a service and a backend are more than");
}

#[test]
fn sites_have_tunnels_with_or_without_a_next_hop() {
    let config = with("next_hop = \"10.2.1.1\"", "tunnel = '10.2.1.9'");
    let site = &config.plan.sites[0];
    assert_eq!(site.next_hop, "10.2.1.9".parse::<std::net::IpAddr>().unwrap());
    assert_eq!(site.tunnel.unwrap().source, None);
    let config = with(
        "next_hop = \"10.2.1.1\"",
        "next_hop = '10.2.1.1'\ntunnel = 'fd00::9'\ntunnel_source = 'fd00::1'",
    );
    let site = &config.plan.sites[0];
    assert_eq!(site.next_hop, "10.2.1.1".parse::<std::net::IpAddr>().unwrap());
    let tunnel = site.tunnel.unwrap();
    assert_eq!(
        (tunnel.endpoint, tunnel.source),
        ("fd00::9".parse().unwrap(), Some("fd00::1".parse().unwrap()))
    );

    let hop = "next_hop = \"10.2.1.1\"";
    one(hop, "tunnel = 'ams'", "sites[0].tunnel: \"ams\" is not an IP address");
    one(
        hop,
        "next_hop = '10.2.1.1'\ntunnel_source = '10.0.0.1'",
        "tunnel_source: means something only beside tunnel",
    );
    one(
        hop,
        "tunnel = '10.2.1.1'\ntunnel_source = 'fd00::1'",
        "fd00::1 is of another family than the tunnel's end",
    );
}

#[test]
fn services_have_manners() {
    let config = with(
        "protocol = \"tcp\"",
        "protocol = \"tcp\"\nmode = 'transparent'\nduring_hold = 'steer'\nslow_start_s = 30\nall_down = 'closed'",
    );
    let service = &config.plan.services[0];
    assert_eq!(service.mode, Mode::Transparent);
    assert_eq!(service.during_hold, DuringHold::Steer);
    assert_eq!(service.slow_start, Duration::from_secs(30));
    assert_eq!(service.all_down, AllDown::Closed);
    assert!(with("weight = 7", "drain = true").plan.backends[1].drain);

    let tcp = "protocol = \"tcp\"";
    one(
        tcp,
        "protocol = 'tcp'\nmode = 'ipvs'",
        "mode: \"ipvs\" is none of \"nat\", \"transparent\", \"dsr\"",
    );
    one(tcp, "protocol = 'tcp'\nduring_hold = 'drop'", "\"drop\" is neither \"hold\" nor \"steer\"");
    one(tcp, "protocol = 'tcp'\nall_down = 'half'", "\"half\" is neither \"open\" nor \"closed\"");
    one(tcp, "protocol = 'tcp'\nslow_start_s = 3601", "slow_start_s: 3601 is outside of 0 to 3600");
    one("weight = 7", "drain = 1", "backends[1].drain: invalid type");
}

const DSR: &str = r#"
[datapath]
interfaces = ["c0"]

[[sites]]
name = "ams"
tunnel = "10.2.1.1"

[[sites]]
name = "fra"
tunnel = "10.2.2.1"

[[backends]]
name = "a"
address = "10.0.0.100:80"
site = "ams"

[[backends]]
name = "b"
address = "10.0.0.100:80"
site = "fra"

[[services]]
name = "web"
address = "10.0.0.100:80"
protocol = "tcp"
mode = "dsr"
backends = ["a", "b"]
"#;

#[test]
fn servers_behind_dsr_hold_the_services_address() {
    let config = Config::parse(DSR, "t.toml").unwrap();
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
    let said = errors(&DSR.replace("mode = \"dsr\"", "mode = 'transparent'"));
    assert_eq!(said.len(), 2, "{said:#?}");
    assert!(
        said[0]
            .contains("backends[1].address: 10.0.0.100:80 is already the address of the backend in line 15")
    );
    assert!(said[1].contains("services[0].address: 10.0.0.100:80 is the address of backend"));
    let said = errors(&DSR.replacen("10.0.0.100:80\"\nsite = \"ams\"", "10.1.0.1:81\"\nsite = \"ams\"", 1));
    assert!(
        said[0].contains("backend \"a\" has the port 81, but with mode = \"dsr\" packets keep"),
        "{said:#?}"
    );
    let warned = |text: String| Config::parse(&text, "t.toml").unwrap().warnings.join("\n");
    let crowded = warned(DSR.replace("site = \"fra\"", "site = \"ams\""));
    assert!(crowded.contains("backends \"a\" and \"b\" are both at site \"ams\""), "{crowded}");
    let bare = errors(&DSR.replace("tunnel = \"10.2.1.1\"", "next_hop = \"10.2.1.1\""));
    assert!(
        bare[0].contains("backends[0].site: site \"ams\" has no tunnel: mode = \"dsr\" puts"),
        "{bare:#?}"
    );
    let six = DSR.replace("10.0.0.100:80", "[fd00::100]:80");
    let said = errors(&six);
    assert!(
        said[0].contains("site \"ams\" has an IPv4 tunnel, which does not carry the backend's IPv6"),
        "{said:#?}"
    );
    Config::parse(&six.replace("10.2.1.1", "fd00:2::1").replace("10.2.2.1", "fd00:2::2"), "t.toml").unwrap();
}

#[test]
fn transparent_services_need_no_source_addresses() {
    let text = GOOD.replace("nat_source4 = \"10.9.0.0/24\"\n", "");
    assert!(errors(&text)[0].contains("10.1.0.1:6379 needs datapath.nat_source4"));
    let text = text.replace("protocol = \"tcp\"", "protocol = \"tcp\"\nmode = 'transparent'");
    Config::parse(&text, "t.toml").unwrap();
}

/// The good file with a check of its tcp service, and of one of its backends.
fn checked(service: &str, backend: &str) -> String {
    let text = GOOD.replace(
        "backends = [\"chat-1\"]\n",
        &format!("backends = [\"chat-1\"]\n[services.check]\n{service}\n"),
    );
    match backend {
        "" => text,
        some => text.replace("site = \"ams\"\n", &format!("site = \"ams\"\n[backends.check]\n{some}\n")),
    }
}

fn check_of(service: &str, backend: &str) -> Check {
    let config = Config::parse(&checked(service, backend), "t.toml").unwrap_or_else(|e| panic!("{e}"));
    let [plan] = &config.checks[..] else { panic!("{:?}", config.checks) };
    assert_eq!((&*plan.backend, &*plan.service), ("chat-1", "chat"));
    plan.check.clone()
}

#[test]
fn checks_are_taken() {
    let tcp = Check {
        probe: Some(Probe::Tcp),
        interval: Duration::from_secs(2),
        timeout: Duration::from_secs(1),
        rise: 2,
        fall: 3,
        resets_per_second: None,
    };
    assert_eq!(check_of("", ""), tcp);
    assert_eq!(
        check_of("interval_ms = 200\nfall = 9\nrise = 1\nresets_per_s = 50", "fall = 1"),
        Check {
            interval: Duration::from_millis(200),
            timeout: Duration::from_millis(200),
            rise: 1,
            fall: 1,
            resets_per_second: Some(50),
            ..tcp.clone()
        }
    );
    let http = |path: &str, host: Option<&str>, status| {
        Some(Probe::Http { path: path.into(), host: host.map(Into::into), status })
    };
    assert_eq!(check_of("type = 'http'", "").probe, http("/", None, 200..=399));
    let full = "type = 'http'\npath = '/up?x=1'\nhost = 'chat.example'\nstatus = '200-204'";
    assert_eq!(check_of(full, "").probe, http("/up?x=1", Some("chat.example"), 200..=204));
    assert_eq!(check_of(full, "status = 201").probe, http("/up?x=1", Some("chat.example"), 201..=201));
    assert_eq!(check_of(full, "type = 'tcp'").probe, Some(Probe::Tcp));
    let udp = |send: &[u8], expect: &[u8]| Some(Probe::Udp { send: send.into(), expect: expect.into() });
    assert_eq!(check_of("type = 'udp'\nsend = 'ping'\nexpect = 'po'", "").probe, udp(b"ping", b"po"));
    assert_eq!(check_of("type = 'udp'\nsend_hex = 'ff FF 0a'", "").probe, udp(&[255, 255, 10], b""));
    assert_eq!(check_of("type = 'none'\nresets_per_s = 1", "").probe, None);
    let none = |backend| Config::parse(&checked("type = 'none'", backend), "t.toml").unwrap().checks;
    assert!(none("").is_empty());
    assert_eq!(none("type = 'tcp'").len(), 1);
}

#[test]
fn a_backend_of_two_services_has_each_different_check_once() {
    let second = |check: &str| {
        let text = checked("", "");
        let text = format!(
            "{text}\n[[services]]\nname = 'two'\naddress = '10.0.0.101:1'\nprotocol = 'tcp'\nbackends = ['chat-1']\n\
             [services.check]\n{check}\n"
        );
        Config::parse(&text, "t.toml").unwrap().checks.len()
    };
    assert_eq!(second(""), 1);
    assert_eq!(second("type = 'http'"), 2);
}

#[test]
fn mistakes_in_checks_have_their_line() {
    for (service, backend, expected) in [
        (
            "type = 'ping'",
            "",
            "t.toml:33: services[0].check.type: \"ping\" is none of \"tcp\", \"http\", \"udp\"",
        ),
        ("path = '/'", "", "services[0].check.path: means something only with type = \"http\""),
        ("type = 'http'\nsend = 'x'", "", "services[0].check.send: means something only with type = \"udp\""),
        ("type = 'http'\npath = 'up'", "", "\"up\" is not a path such as \"/healthz\""),
        ("type = 'http'\nstatus = 99", "", "check.status: write a status code, such as 200, or a range"),
        ("type = 'http'\nstatus = '300-200'", "", "check.status: write a status code"),
        ("type = 'http'\nhost = ''", "", "\"\" cannot be a Host header"),
        ("type = 'udp'\nsend_hex = 'xy'", "", "check.send_hex: \"xy\" is not hexadecimal"),
        ("type = 'udp'\nsend_hex = 'abc'", "", "\"abc\" is not hexadecimal"),
        (
            "type = 'udp'\nsend = 'a'\nsend_hex = 'ab'",
            "",
            "stands beside services[0].check.send: give one of them",
        ),
        ("interval_ms = 500\ntimeout_ms = 501", "", "timeout_ms: 501 is more than interval_ms, which is 500"),
        ("interval_ms = 99", "", "interval_ms: 99 is outside of 100 to 3600000"),
        ("rise = 0", "", "rise: 0 is outside of 1 to 100"),
        ("resets_per_s = 0", "", "resets_per_s: 0 is outside of 1 to"),
        ("colour = 1", "", "check.colour: unknown field; here may stand: type, interval_ms"),
        ("", "fall = 0", "t.toml:21: backends[0].check.fall: 0 is outside of 1 to 100"),
        // A mistake of the service is said once, however many backends share it.
        ("fall = 0", "rise = 1", "services[0].check.fall: 0 is outside of 1 to 100"),
    ] {
        let said = errors(&checked(service, backend));
        assert_eq!(said.len(), 1, "{said:#?}");
        assert!(said[0].contains(expected), "{} does not contain {expected:?}", said[0]);
    }
    let udp = GOOD.replace("backends = [\"chat-6\"]", "backends = [\"chat-6\"]\n[services.check]\nrise = 1");
    assert!(errors(&udp)[0].contains("services[1].check.type: is missing: a udp service is checked with"));
}

#[test]
fn a_file_of_ten_thousand_backends_is_read_in_a_moment() {
    let mut text = GOOD.to_owned();
    let mut names = String::new();
    for i in 0..10_000 {
        let (a, b) = (i / 250 + 10, i % 250 + 1);
        text += &format!("[[backends]]\nname = 'b{i}'\naddress = '10.1.{a}.{b}:80'\nsite = 'ams'\n");
        names += &format!("'b{i}',");
    }
    text += &format!(
        "[[services]]\nname = 'big'\naddress = '10.0.0.99:80'\nprotocol = 'tcp'\nbackends = [{names}]\n\
         [services.check]\ntype = 'http'\n"
    );
    let start = std::time::Instant::now();
    let config = Config::parse(&text, "t.toml").unwrap();
    assert_eq!((config.plan.backends.len(), config.checks.len()), (10_002, 10_000));
    // A debug build on a busy machine; quadratic work would take minutes.
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}
