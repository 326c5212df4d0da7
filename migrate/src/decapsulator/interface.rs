//! Which hook suits an interface, from netlink.

use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::{LinkAttribute, LinkLayerType};

use super::DecapsulatorError;
use super::config::HookChoice;

/// Which hooks are tried on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The driver's XDP hook, or the kernel's generic one.
    Xdp,
    /// tc's ingress.
    Tc,
    /// The driver's XDP hook, or tc's ingress.
    NativeXdpOrTc,
}

/// Buses of machines. On the others (virtio, vmbus, xen) and on none (veth, bridges) is what a hypervisor or the kernel
/// made up: there segments arrive merged, which XDP cannot take and would keep their sender from doing.
const MACHINE_BUSES: [&str; 4] = ["pci", "usb", "platform", "mdio_bus"];

/// Looks at the interface, in the calling thread's network namespace.
pub async fn choose(name: &str, hook: HookChoice) -> Result<Choice, DecapsulatorError> {
    let problem = |problem: String| DecapsulatorError::Interface { name: name.to_owned(), problem };
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|error| problem(format!("cannot be looked at: {error}")))?;
    let connection = tokio::spawn(connection);
    let found = handle.link().get().match_name(name).execute().try_next().await;
    connection.abort();
    let Ok(Some(link)) = found else {
        return Err(problem("is not there: `ip link` shows those that are".to_owned()));
    };
    if link.header.link_layer_type != LinkLayerType::Ether {
        return Err(problem(format!(
            "is no Ethernet interface ({:?}): one is meant where the load balancer's packets come in",
            link.header.link_layer_type
        )));
    }
    let on_machine = link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::ParentDevBusName(bus) if MACHINE_BUSES.contains(&bus.as_str()))
    });
    Ok(match hook {
        HookChoice::Xdp => Choice::Xdp,
        HookChoice::Tc => Choice::Tc,
        HookChoice::Auto if on_machine => Choice::NativeXdpOrTc,
        HookChoice::Auto => Choice::Tc,
    })
}
