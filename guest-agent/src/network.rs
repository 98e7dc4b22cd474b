//! The guest's place in its network: loopback, interfaces by MAC address, routes, neighbours.

use std::{
    fs,
    path::{Path, PathBuf},
};

use mvm_protocol::{Address, Configure, Interface};

use crate::{
    bus,
    error::{Context, Error, Result},
    netlink::{Link, Netlink, add_address, add_neighbour, add_route, rename_link, set_link},
};

/// Longest name of an interface: `IFNAMSIZ` less its NUL.
const MAX_NAME: usize = 15;

/// Sets up everything a configuration names.
pub(crate) fn configure(request: &Configure) -> Result<()> {
    let mut kernel = Netlink::new().context(|| "cannot open netlink".into())?;
    let mut links = kernel.links().context(|| "cannot list interfaces".into())?;
    if let Some(lo) = links.iter().find(|link| link.name == "lo") {
        kernel.perform(set_link(lo.index, 0, true)).context(|| "cannot bring loopback up".into())?;
    }
    for interface in &request.interfaces {
        set_up(&mut kernel, &mut links, interface)?;
    }
    for route in &request.routes {
        if let Some(destination) = route.destination {
            check(destination)?;
        }
        let index = index_of(&links, &route.interface)?;
        let what = || format!("cannot add a route through {}", route.interface);
        kernel.perform(add_route(index, route)).context(what)?;
    }
    for it in &request.neighbours {
        let index = index_of(&links, &it.interface)?;
        kernel
            .perform(add_neighbour(index, it.ip, it.mac))
            .context(|| format!("cannot add neighbour {}", it.ip))?;
    }
    Ok(())
}

fn set_up(kernel: &mut Netlink, links: &mut [Link], interface: &Interface) -> Result<()> {
    let name = interface.name.as_str();
    if name.is_empty() || name.len() > MAX_NAME || name.contains(['/', ' ', '\0']) {
        return Err(Error::Invalid(format!("{name:?} cannot be the name of an interface")));
    }
    let link = links.iter_mut().find(|link| link.mac == interface.mac);
    let link = link.ok_or_else(|| Error::NotFound(format!("no interface has the MAC address of {name}")))?;
    let index = link.index;
    if link.name != name {
        kernel.perform(set_link(index, 0, false)).context(|| format!("cannot bring {} down", link.name))?;
        kernel
            .perform(rename_link(index, name))
            .context(|| format!("cannot rename {} to {name}", link.name))?;
        link.name = name.to_owned();
    }
    kernel.perform(set_link(index, interface.mtu, true)).context(|| format!("cannot bring {name} up"))?;
    for &address in &interface.addresses {
        check(address)?;
        let what = || format!("cannot give {name} the address {}/{}", address.ip, address.prefix);
        kernel.perform(add_address(index, address)).context(what)?;
    }
    Ok(())
}

/// Lets go of the card of this hardware address; with it go its addresses and routes.
pub(crate) fn eject(sys_net: &Path, mac: [u8; 6]) -> Result<()> {
    let text = mac.map(|byte| format!("{byte:02x}")).join(":");
    let cards = fs::read_dir(sys_net).context(|| "cannot list network cards".into())?;
    let is_it = |card: &PathBuf| fs::read_to_string(card.join("address")).is_ok_and(|it| it.trim() == text);
    let card = cards.flatten().map(|card| card.path()).find(is_it);
    let card = card.ok_or_else(|| Error::NotFound(format!("no interface has the MAC address {text}")))?;
    bus::remove(&card.join("device"), || format!("cannot remove the function of the card {text}"))
}

fn index_of(links: &[Link], name: &str) -> Result<u32> {
    let link = links.iter().find(|link| link.name == name);
    link.map(|link| link.index).ok_or_else(|| Error::NotFound(format!("there is no interface {name}")))
}

fn check(address: Address) -> Result<()> {
    let bits = if address.ip.is_ipv4() { 32 } else { 128 };
    if address.prefix > bits {
        return Err(Error::Invalid(format!("{}/{} is not a network", address.ip, address.prefix)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_longer_than_the_address_is_refused() {
        let address = |ip: &str, prefix| Address { ip: ip.parse().unwrap(), prefix };
        assert!(check(address("10.0.0.1", 32)).is_ok());
        assert!(check(address("10.0.0.1", 33)).is_err());
        assert!(check(address("fd00::1", 128)).is_ok());
        assert!(check(address("fd00::1", 129)).is_err());
    }

    #[test]
    fn a_card_is_ejected_by_its_address_and_one_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (net, function) = (dir.path().join("net"), dir.path().join("0000:00:05.0"));
        fs::create_dir_all(function.join("virtio3")).unwrap();
        fs::write(function.join("remove"), "").unwrap();
        for (name, address) in [("lo", "00:00:00:00:00:00\n"), ("eth0", "02:00:00:00:00:0a\n")] {
            fs::create_dir_all(net.join(name)).unwrap();
            fs::write(net.join(name).join("address"), address).unwrap();
        }
        std::os::unix::fs::symlink(function.join("virtio3"), net.join("eth0/device")).unwrap();
        let error = eject(&net, [2, 0, 0, 0, 0, 11]).unwrap_err().to_string();
        assert_eq!(error, "no interface has the MAC address 02:00:00:00:00:0b");
        eject(&net, [2, 0, 0, 0, 0, 10]).unwrap();
        assert_eq!(fs::read_to_string(function.join("remove")).unwrap(), "1");
    }

    #[test]
    fn names_that_the_kernel_would_not_take_are_refused_before_anything_is_changed() {
        let mut kernel = Netlink::new().unwrap();
        for name in ["", "a name", "a/b", "sixteen-letters-"] {
            let interface = Interface { mac: [0; 6], name: name.into(), mtu: 0, addresses: vec![] };
            assert!(matches!(set_up(&mut kernel, &mut [], &interface), Err(Error::Invalid(_))), "{name}");
        }
    }
}
