//! Finds interfaces that are one end of a virtual pair whose other end is in another namespace. At the tc hook packets
//! for those are handed over without the queue between, which every packet would have to be woken up for.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::{io, thread};

use futures_util::TryStreamExt;
use lb_core::record::PEERED_INTERFACES;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo};

use super::mapped::MappedArray;
use super::program::kernel;
use crate::datapath::DatapathError;

/// Marks the interfaces that are such ends, and no others.
pub fn mark(table: &MappedArray<AtomicU64>, interfaces: &[String]) -> Result<(), DatapathError> {
    let interfaces = interfaces.to_vec();
    // A thread of its own: the caller may be in an asynchronous runtime already.
    let found = thread::scope(|scope| scope.spawn(|| find(&interfaces)).join());
    let found = found
        .unwrap_or_else(|_| Err(io::Error::other("the thread that asks panicked")))
        .map_err(kernel("looking at the interfaces (config: datapath.interfaces)"))?;
    let per_element = u64::BITS;
    for element in 0..PEERED_INTERFACES / per_element {
        let bits = found
            .iter()
            .filter(|interface| **interface / per_element == element)
            .fold(0, |bits, interface| bits | 1 << (interface % per_element));
        table.get(element).expect("the table has a bit for each").store(bits, Relaxed);
    }
    Ok(())
}

/// Indexes of those of the interfaces that are ends of such pairs.
fn find(interfaces: &[String]) -> io::Result<Vec<u32>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let mut found = Vec::new();
        for interface in interfaces {
            let mut links = handle.link().get().match_name(interface.clone()).execute();
            if let Some(link) = links.try_next().await.map_err(io::Error::other)?
                && is_peered(&link.attributes)
                && link.header.index < PEERED_INTERFACES
            {
                found.push(link.header.index);
            }
        }
        Ok(found)
    })
}

fn is_peered(attributes: &[LinkAttribute]) -> bool {
    let is_pair = attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Veth)))
    });
    let is_elsewhere = attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::LinkNetNsId(_)));
    is_pair && is_elsewhere
}
