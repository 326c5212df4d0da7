//! Why a packet went where it went: one enum for the XDP action, the counter, the metric's label, the
//! admin API's text and the docs' table.

/// What a reason means for the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Sent on.
    Forward,
    /// Kept in a hold queue.
    Hold,
    /// Left to this machine's own network stack.
    Pass,
    /// Dropped.
    Drop,
}

macro_rules! reasons {
    ($($name:ident $class:ident $label:literal $text:literal)*) => {
        /// Why a packet was forwarded, held, passed or dropped.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Reason {
            $(#[doc = $text] $name,)*
        }

        impl Reason {
            /// Every reason, in the order of the counters.
            pub const ALL: &[Reason] = &[$(Reason::$name),*];

            /// The reason of a number; beyond the last, the last.
            #[inline(always)]
            pub const fn from_number(number: u32) -> Self {
                $(if number == Reason::$name as u32 { return Reason::$name; })*
                Self::ALL[Self::ALL.len() - 1]
            }

            /// What it means for the packet.
            pub const fn class(self) -> Class {
                match self { $(Self::$name => Class::$class),* }
            }

            /// The metric's label.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label),* }
            }

            /// One sentence for an operator.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }
        }
    };
}

reasons! {
    ToBackend       Forward "to_backend"       "sent to the backend's location"
    ToClient        Forward "to_client"        "sent back to the client"
    ErrorToBackend  Forward "error_to_backend" "an ICMP error about a flow, translated and sent to the backend"
    ErrorToClient   Forward "error_to_client"  "an ICMP error about a flow, translated and sent to the client"
    EchoAnswered    Forward "echo_answered"    "an echo request to a virtual address, answered"
    TooBigAnswered  Forward "too_big_answered" "larger than the way to the site takes; the sender was told (packet too big)"
    Held            Hold    "held"             "kept in the backend's hold queue"
    NotIp           Pass    "not_ip"           "neither IPv4 nor IPv6 (ARP, VLAN and the like)"
    Truncated       Pass    "truncated"        "shorter than its headers"
    IpOptions       Pass    "ip_options"       "IPv4 header with options or of another length"
    OtherProtocol   Pass    "other_protocol"   "neither TCP nor UDP nor ICMP that concerns a flow"
    NotAService     Pass    "not_a_service"    "no service at the destination and no known flow"
    GateClosed      Drop    "gate_closed"      "the backend's gate is at drop"
    HoldRefused     Drop    "hold_refused"     "the capture ring had no room or the frame was too large to hold"
    StaleSite       Drop    "stale_site"       "came from a site that is not the backend's location"
    ResetWhileHeld  Drop    "reset_while_held" "a reset or an ICMP error from the backend's side while its gate was not forward"
    NoFlow          Drop    "no_flow"          "a TCP segment of a connection that is not known here"
    NoBackend       Drop    "no_backend"       "the service has no backend to choose"
    NoNatSource     Drop    "no_nat_source"    "no NAT source prefix for the address family"
    NoPort          Drop    "no_port"          "no free NAT port was found"
    NoRoom          Drop    "no_room"          "the flow table refused a new flow"
    NewFlowLimit    Drop    "new_flow_limit"   "a new flow beyond the bound of its source prefix or this CPU"
    NoRoute         Drop    "no_route"         "the location has no resolved next hop"
    NoTunnel        Drop    "no_tunnel"        "the location of a dsr service's backend has no tunnel endpoint"
    TtlExpired      Drop    "ttl_expired"      "TTL or hop limit used up"
    TooBig          Drop    "too_big"          "larger than the way to the site takes, and the sender is not to be told"
    UnknownFragment Pass    "unknown_fragment" "a fragment whose first one was not seen, or is none of ours"
    BadFragment     Drop    "bad_fragment"     "a first fragment without its whole transport header"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_numbered_in_order_and_labels_are_unique() {
        for (i, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
            assert!(Reason::ALL[..i].iter().all(|other| other.label() != reason.label()));
        }
    }
}
