//! Destination NAT by the kernel's connection tracking.

use anyhow::{Context, bail};
use lab::{address, process::Process};

use crate::place::{INTERFACES, IPERF_PORT, PORT, Place};

/// The rules; `flowtable`: packets of established connections take the software fast path.
pub fn rules(flowtable: bool) -> String {
    let (virtual_address, backend) = (address::VIRTUAL4, address::backend4(1));
    let dnat = format!(
        "chain in {{\n  type nat hook prerouting priority dstnat\n  \
         ip daddr {virtual_address} tcp dport {{ {PORT}, {IPERF_PORT} }} dnat to {backend}\n  \
         ip daddr {virtual_address} udp dport {PORT} dnat to {backend}\n}}\n"
    );
    let devices = INTERFACES.join(", ");
    let known = format!(
        "flowtable fast {{\n  hook ingress priority 0\n  devices = {{ {devices} }}\n}}\nchain known {{\n  \
         type filter hook forward priority 0\n  meta l4proto {{ tcp, udp }} flow add @fast\n}}\n"
    );
    format!("table ip path {{\n{dnat}{}}}\n", if flowtable { &known } else { "" })
}

/// Loads the rules.
pub fn start(place: &Place, flowtable: bool) -> anyhow::Result<()> {
    let path = place.lab().dir().join("rules.nft");
    std::fs::write(&path, rules(flowtable)).context("cannot write the nftables rules")?;
    let mut command = place.lab().lb().command("nft");
    command.arg("-f").arg(&path);
    let mut loading = Process::spawn("nft", place.lab().dir(), command)?;
    let status = lab::wait_for(std::time::Duration::from_secs(5), || loading.ended());
    if flowtable && status.is_some_and(|status| !status.success()) {
        bail!("the kernel takes no flowtable (CONFIG_NF_FLOW_TABLE, CONFIG_NFT_FLOW_OFFLOAD)");
    }
    if !status.is_some_and(|status| status.success()) {
        return Err(loading.not_ready("does not load its rules").into());
    }
    Ok(())
}
