//! Files with mistakes, and what is said about them.

use super::*;
use crate::datapath::{AllDown, DuringHold, Mode, Overflow};

mod complete;

const GOOD: &str = r#"
[datapath]
interfaces = ["c0", "a0", "b0"]
nat_source4 = "10.9.0.0/24"
nat_source6 = "fd00:9::/112"

[[sites]]
name = "ams"
next_hop = "10.2.1.1"
agent = "http://10.2.1.1:7401/"

[[sites]]
name = "fra"
next_hop = "10.2.2.1"

[[backends]]
name = "chat-1"
address = "10.1.0.1:6379"
site = "ams"

[[backends]]
name = "chat-6"
address = "[fd00:1::1]:6379"
site = "fra"
weight = 7

[[services]]
name = "chat"
address = "10.0.0.100:6379"
protocol = "tcp"
backends = ["chat-1"]

[[services]]
name = "chat6"
address = "[fd00::100]:6379"
protocol = "udp"
backends = ["chat-6"]
"#;

fn errors(text: &str) -> Vec<String> {
    let errors = Config::parse(text, "t.toml").expect_err("the file has mistakes");
    errors.to_string().lines().map(str::to_owned).collect()
}

/// One edit of the good file, and the one line that is said about it.
#[track_caller]
fn one(from: &str, to: &str, expected: &str) {
    assert!(GOOD.contains(from), "{from:?} is not in the good file");
    let said = errors(&GOOD.replacen(from, to, 1));
    assert_eq!(said.len(), 1, "{said:#?}");
    assert!(said[0].contains(expected), "{} does not contain {expected:?}", said[0]);
}

#[test]
fn defaults_are_filled_in() {
    let config = Config::parse(GOOD, "t.toml").unwrap();
    assert_eq!(config.admin.listen, "127.0.0.1:7400".parse().unwrap());
    assert_eq!(config.datapath.pin_path, PathBuf::from("/sys/fs/bpf/drover"));
    assert_eq!(config.migrations.journal, PathBuf::from("/var/lib/drover/lb.redb"));
    assert_eq!(config.hold.limits.max_bytes, 64 << 20);
    assert_eq!(config.hold.limits.max_age, Duration::from_secs(10));
    assert_eq!(config.hold.limits.overflow, Overflow::DropNewest);
    assert_eq!(config.hold.deadline, Duration::from_secs(5));
    assert_eq!(config.hold.handshakes, Duration::from_millis(250));
    assert_eq!(config.agents.get("ams").map(String::as_str), Some("http://10.2.1.1:7401"));
    assert!(!config.agents.contains_key("fra"));
    let weights: Vec<u32> = config.plan.backends.iter().map(|backend| backend.weight).collect();
    assert_eq!(weights, [100, 7]);
    assert_eq!(config.datapath.hook, HookChoice::Auto);
    assert_eq!(config.datapath.limits, Limits::default());
    assert_eq!(config.flows, FlowTimes::default());
    assert!(config.checks.is_empty() && config.plan.sites.iter().all(|site| site.tunnel.is_none()));
    for (service, weight) in config.plan.services.iter().zip([100, 7]) {
        let manners = (service.mode, service.during_hold, service.all_down, service.slow_start);
        assert_eq!(manners, (Mode::Nat, DuringHold::Hold, AllDown::Open, Duration::ZERO));
        assert_eq!(service.weights, [weight]);
    }
    assert_eq!(config.protocol_of("chat-1"), Protocol::Tcp);
    assert_eq!(config.protocol_of("chat-6"), Protocol::Udp);
    assert!(config.warnings.is_empty());
}

#[test]
fn what_is_said_is_taken() {
    let more = "[migrations]\njournal = '/j'\n[admin]\nlisten = '[::1]:9'\n[hold]\nmax_bytes = '1 MiB'\nmax_age_ms = 7\ndeadline_ms = 8\nhandshakes_ms = 0\noverflow = 'drop-oldest'\n";
    let config = Config::parse(&format!("{more}{GOOD}"), "t.toml").unwrap();
    assert_eq!(config.admin.listen, "[::1]:9".parse().unwrap());
    assert_eq!(config.migrations.journal, PathBuf::from("/j"));
    assert_eq!(config.hold.limits.max_bytes, 1 << 20);
    assert_eq!(config.hold.limits.max_age, Duration::from_millis(7));
    assert_eq!(config.hold.limits.overflow, Overflow::DropOldest);
    assert_eq!(config.hold.deadline, Duration::from_millis(8));
    assert_eq!(config.hold.handshakes, Duration::ZERO);
}

#[test]
fn each_mistake_has_its_own_line() {
    one("weight = 7", "wieght = 7", "t.toml:25: backends[1].wieght: unknown field; here may stand: name,");
    one("weight = 7", "weight = 0", "backends[1].weight: 0 is outside of 1 to 1000");
    one("weight = 7", "weight = 1001", "1001 is outside of 1 to 1000");
    one("weight = 7", "weight = 'heavy'", "backends[1].weight: invalid type: string \"heavy\", expected i64");
    one("site = \"fra\"", "site = \"muc\"", "t.toml:24: backends[1].site: there is no site \"muc\"");
    one(
        "10.1.0.1:6379",
        "10.1.0.1",
        "t.toml:18: backends[0].address: \"10.1.0.1\" is not an address with a port",
    );
    one("10.1.0.1:6379", "10.1.0.1:0", "backends[0].address: port 0 is no port");
    one("10.1.0.1:6379", "127.0.0.1:1", "127.0.0.1 is a loopback address");
    one("10.1.0.1:6379", "224.0.0.1:1", "224.0.0.1 is a multicast address");
    one("10.1.0.1:6379", "10.9.0.9:1", "10.9.0.9 is inside of the NAT source prefix 10.9.0.0/24");
    one("[fd00:1::1]:6379", "[fe80::1]:6379", "fe80::1 is a link-local address");
    one("[fd00:1::1]:6379", "[::ffff:10.1.0.9]:6379", "::ffff:10.1.0.9 is an IPv4 address written as IPv6");
    one(
        "next_hop = \"10.2.1.1\"",
        "next_hop = \"gateway\"",
        "sites[0].next_hop: \"gateway\" is not an IP address",
    );
    one("next_hop = \"10.2.1.1\"", "next_hop = \"0.0.0.0\"", "0.0.0.0 is the unspecified address");
    one(
        "next_hop = \"10.2.1.1\"",
        "",
        "t.toml:7: sites[0].next_hop: is missing: give next_hop, tunnel, or both",
    );
    one("http://10.2.1.1:7401/", "10.2.1.1:7401", "sites[0].agent: ");
    one("http://10.2.1.1:7401/", "ftp://10.2.1.1:7401", "starts with neither https:// nor http://");
    one("http://10.2.1.1:7401/", "https://10.2.1.1:7401", "asks for TLS, and there is no section [tls]");
    one("http://10.2.1.1:7401/", "http://10.2.1.1", "has no port");
    one("http://10.2.1.1:7401/", "http://10.2.1.1:7401/x", "goes on after the port");
    one("\"chat6\"", "\"chat 6\"", "\"chat 6\" cannot be a name");
    one(
        "protocol = \"tcp\"",
        "protocol = \"sctp\"",
        "services[0].protocol: \"sctp\" is neither \"tcp\" nor \"udp\"",
    );
    one(
        "backends = [\"chat-1\"]",
        "backends = [\"chat-2\"]",
        "services[0].backends: there is no backend \"chat-2\"",
    );
    one("backends = [\"chat-1\"]", "backends = []", "services[0].backends: is empty");
    one("backends = [\"chat-1\"]", "backends = [\"chat-1\", \"chat-1\"]", "\"chat-1\" is named twice");
    one("backends = [\"chat-1\"]", "backends = [\"chat-6\"]", "of another family than the service's");
    one("backends = [\"chat-1\"]", "backends = \"chat-1\"", "services[0].backends: invalid type");
    one("10.0.0.100:6379", "10.1.0.1:6379", "10.1.0.1:6379 is the address of backend \"chat-1\"");
    one(
        "nat_source6 = \"fd00:9::/112\"",
        "",
        "backends[1].address: [fd00:1::1]:6379 needs datapath.nat_source6",
    );
    one("nat_source4 = \"10.9.0.0/24\"", "nat_source4 = \"10.9.0.1/24\"\n#", "bits behind its prefix length");
    one("[\"c0\", \"a0\", \"b0\"]", "[]", "t.toml:3: datapath.interfaces: is empty");
    one("[\"c0\", \"a0\", \"b0\"]", "[\"c0\", \"c0\"]", "\"c0\" is named twice");
    one("[\"c0\", \"a0\", \"b0\"]", "[\"far too long a name\"]", "cannot be the name of an interface");
    one("[\"c0\", \"a0\", \"b0\"]", "[1]", "invalid type: integer `1`, expected a string");
    one(
        "[datapath]",
        "datapth = 1\n[datapath]",
        "datapth: unknown field; here may stand: admin, datapath, hold",
    );
    one(
        "[datapath]",
        "[hold]\nmax_bytes = '64 MB'\n[datapath]",
        "hold.max_bytes: \"MB\" is not one of B, KiB",
    );
    one("[datapath]", "[hold]\nmax_bytes = 5\n[datapath]", "5 bytes is outside of 64 KiB to 16 GiB");
    one("[datapath]", "[hold]\nmax_bytes = true\n[datapath]", "found boolean");
    one("[datapath]", "[hold]\ndeadline_ms = 0\n[datapath]", "hold.deadline_ms: 0 is outside of 1 to 600000");
    one("[datapath]", "[hold]\noverflow = 'all'\n[datapath]", "hold.overflow: \"all\" is neither");
    one(
        "[datapath]",
        "[admin]\nlisten = '7400'\n[datapath]",
        "t.toml:3: admin.listen: \"7400\" is not an address",
    );
    one("[datapath]", "[admin]\nlisten = '127.0.0.1:0'\n[datapath]", "port 0");
    one(
        "[datapath]",
        "[migrations]\njournal = 'j'\n[datapath]",
        "migrations.journal: \"j\" is not an absolute path",
    );
    one("[datapath]", "[datapath]\npin_path = 'here'", "datapath.pin_path: \"here\" is not an absolute path");
}

#[test]
fn names_and_addresses_are_unique() {
    one(
        "\"chat6\"",
        "\"chat\"",
        "t.toml:34: services[1].name: \"chat\" is already the name of the service in line 28",
    );
}

#[test]
fn two_services_on_one_address_are_refused_unless_the_protocol_differs() {
    let second = |protocol: &str| {
        format!(
            "{GOOD}\n[[services]]\nname = 'two'\naddress = '10.0.0.100:6379'\nprotocol = '{protocol}'\nbackends = ['chat-1']\n"
        )
    };
    assert!(Config::parse(&second("udp"), "t.toml").is_ok());
    assert_eq!(
        errors(&second("tcp")),
        ["t.toml:41: services[2].address: 10.0.0.100:6379 is already the address of the service in line 29"]
    );
}

#[test]
fn two_backends_on_one_address_are_refused() {
    let text = format!("{GOOD}\n[[backends]]\nname = 'two'\naddress = '10.1.0.1:6379'\nsite = 'ams'\n");
    assert_eq!(
        errors(&text),
        ["t.toml:41: backends[2].address: 10.1.0.1:6379 is already the address of the backend in line 18"]
    );
}

#[test]
fn all_mistakes_are_reported_at_once_in_the_order_of_lines() {
    let text = GOOD
        .replace("weight = 7", "weight = 0\ncolour = 'red'")
        .replace("10.2.2.1", "nowhere")
        .replace("protocol = \"tcp\"", "protocol = \"sctp\"\nmode = 'ipvs'");
    let said = errors(&text);
    let fields: Vec<&str> = said.iter().map(|line| line.split(": ").nth(1).unwrap()).collect();
    assert_eq!(
        fields,
        [
            "sites[1].next_hop",
            "backends[1].weight",
            "backends[1].colour",
            "services[0].protocol",
            "services[0].mode"
        ]
    );
}

#[test]
fn an_empty_file_says_what_is_missing() {
    let said = errors("");
    for what in ["datapath.interfaces", "sites", "backends", "services"] {
        assert!(said.iter().any(|line| line.contains(what)), "{what} in {said:#?}");
    }
}

#[test]
fn a_text_that_is_not_toml_is_placed() {
    let said = errors("[datapath]\ninterfaces = [\"c0\"\nx = = 2\n");
    assert!(said[0].starts_with("t.toml:"), "{said:#?}");
}

#[test]
fn a_table_that_should_be_a_list_says_how_to_write_it() {
    let text = GOOD.replacen("[[sites]]\nname = \"ams\"", "[sites]\nname = \"ams\"", 1);
    let text = text.replacen("[[sites]]\nname = \"fra\"\nnext_hop = \"10.2.2.1\"\n", "", 1);
    assert!(errors(&text).iter().any(|line| line.contains("write [[sites]] instead of [sites]")));
}

#[test]
fn a_remote_admin_listener_has_to_be_meant() {
    let with = |admin: &str| format!("[admin]\nlisten = '0.0.0.0:7400'\n{admin}\n{GOOD}");
    assert!(errors(&with(""))[0].contains("set allow_remote = true in [admin]"));
    assert!(errors(&with("allow_remote = false"))[0].contains("set allow_remote = true in [admin]"));
    let config = Config::parse(&with("allow_remote = true"), "t.toml").unwrap();
    assert_eq!(config.admin.listen, "0.0.0.0:7400".parse().unwrap());
    assert_eq!(config.warnings.len(), 1);
}

#[test]
fn a_backend_that_nobody_uses_is_allowed_with_a_warning() {
    let text = format!("{GOOD}\n[[backends]]\nname = 'idle'\naddress = '10.1.0.2:1'\nsite = 'ams'\n");
    let config = Config::parse(&text, "t.toml").unwrap();
    assert!(config.warnings[0].contains("\"idle\" is in no service"));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::load(Path::new("/nonexistent/drover.toml")).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/drover.toml"));
}
