//! Tables of meshes and ways through them.

use super::*;
use crate::{
    mesh::{Gateway, LoadBalancing},
    testing,
};

/// A service `app/web` at 10.0.0.1:80 of one HBONE pod at 10.1.0.1:8080, a waypoint at 10.1.0.9 behind `app/wp` (10.0.0.9), a client.
fn mesh(change: impl Fn(&mut Service, &mut Workload)) -> (Mesh, Workload) {
    let mesh = Mesh::new("");
    let mut web = testing::service("app/web", &["10.0.0.1"], &[(80, 8080)]);
    let mut pod = testing::workload("web", &["10.1.0.1"]);
    pod.tunnel = Tunnel::Hbone;
    pod.services = Box::new([("app/web".into(), Arc::from([(80, 8080)]))]);
    change(&mut web, &mut pod);
    mesh.insert_service(web);
    mesh.insert_workload(pod);
    let mut waypoint = testing::workload("waypoint", &["10.1.0.9"]);
    waypoint.tunnel = Tunnel::Hbone;
    waypoint.services = Box::new([("app/wp".into(), Arc::from([(15008, 15008)]))]);
    mesh.insert_workload(waypoint);
    mesh.insert_service(testing::service("app/wp", &["10.0.0.9"], &[(15008, 15008)]));
    let client = testing::workload("client", &["10.1.0.5"]);
    mesh.insert_workload(client.clone());
    (mesh, client)
}

/// `address`, then the authority and the accounts that may answer where it is a tunnel.
fn way(mesh: &Mesh, from: &Workload, target: &str) -> Result<String, NoRoute> {
    let route = decide(mesh, from, target.parse().unwrap())?;
    let to = match route.to {
        To::Address(address) => address.to_string(),
        To::Name(name, port) => format!("{name}:{port}"),
    };
    let accounts = |ids: &Identities| {
        let accounts: Vec<_> = ids.iter().map(|id| id.service_account().unwrap().to_owned()).collect();
        accounts.join(",")
    };
    Ok(match route.tunnel {
        None => to,
        Some(tunnel) => match tunnel.inner {
            None => format!("{to} {} {}", tunnel.authority, accounts(&tunnel.expect)),
            Some(inner) => format!(
                "{to} {} {} inside {} {}",
                tunnel.authority,
                accounts(&tunnel.expect),
                inner.authority,
                accounts(&inner.expect)
            ),
        },
    })
}

fn gateway(target: GatewayTarget) -> Option<Gateway> {
    Some(Gateway { target, port: 15008 })
}

#[test]
fn addresses_lead_to_endpoints_pods_or_through() {
    let (mesh, client) = mesh(|_, _| ());
    assert_eq!(
        way(&mesh, &client, "10.0.0.1:80").unwrap(),
        "10.1.0.1:15008 10.1.0.1:8080 web"
    );
    assert_eq!(
        way(&mesh, &client, "10.1.0.1:9999").unwrap(),
        "10.1.0.1:15008 10.1.0.1:9999 web"
    );
    assert_eq!(way(&mesh, &client, "10.1.0.5:80").unwrap(), "10.1.0.5:80");
    assert_eq!(way(&mesh, &client, "192.0.2.1:443").unwrap(), "192.0.2.1:443");
    let no_port = way(&mesh, &client, "10.0.0.1:81").unwrap_err();
    assert!(matches!(no_port, NoRoute::NoEndpoint { port: 81, .. }));
}

#[test]
fn a_service_with_a_waypoint_is_reached_through_it_however_it_is_named() {
    for target in [
        GatewayTarget::Service("app/wp".into()),
        GatewayTarget::Address("".into(), [10, 0, 0, 9].into()),
        GatewayTarget::Address("".into(), [10, 1, 0, 9].into()),
    ] {
        let (mesh, client) = mesh(|web, _| web.waypoint = gateway(target.clone()));
        assert_eq!(
            way(&mesh, &client, "10.0.0.1:80").unwrap(),
            "10.1.0.9:15008 10.0.0.1:80 waypoint"
        );
        // The pod itself has none.
        assert_eq!(way(&mesh, &client, "10.1.0.1:80").unwrap(), "10.1.0.1:15008 10.1.0.1:80 web");
        // And the waypoint goes on.
        let waypoint = mesh.workload_at([10, 1, 0, 9].into()).unwrap();
        assert_eq!(
            way(&mesh, &waypoint, "10.0.0.1:80").unwrap(),
            "10.1.0.1:15008 10.1.0.1:8080 web"
        );
    }
}

#[test]
fn a_workloads_waypoint_is_for_its_address_and_not_for_services() {
    let (mesh, client) = mesh(|_, pod| pod.waypoint = gateway(GatewayTarget::Service("app/wp".into())));
    assert_eq!(
        way(&mesh, &client, "10.1.0.1:8080").unwrap(),
        "10.1.0.9:15008 10.1.0.1:8080 waypoint"
    );
    assert_eq!(
        way(&mesh, &client, "10.0.0.1:80").unwrap(),
        "10.1.0.1:15008 10.1.0.1:8080 web"
    );
}

#[test]
fn nothing_goes_around_a_waypoint_that_is_missing() {
    for target in [
        GatewayTarget::Service("app/nobody".into()),
        GatewayTarget::Service("app/web".into()),
        GatewayTarget::Address("".into(), [10, 7, 7, 7].into()),
    ] {
        // `app/web` is a service, but not one that ends tunnels.
        let (mesh, client) = mesh(|web, pod| {
            web.waypoint = gateway(target.clone());
            pod.waypoint = gateway(target.clone());
        });
        for address in ["10.0.0.1:80", "10.1.0.1:8080"] {
            assert!(
                matches!(way(&mesh, &client, address), Err(NoRoute::NoWaypoint(_))),
                "{target:?}"
            );
        }
    }
}

#[test]
fn a_workload_without_a_tunnel_or_an_address_is_reached_as_what_it_is() {
    let (mesh, client) = mesh(|_, pod| pod.tunnel = Tunnel::None);
    assert_eq!(way(&mesh, &client, "10.0.0.1:80").unwrap(), "10.1.0.1:8080");
    let (mesh, client) = self::mesh(|_, pod| {
        pod.addresses.clear();
        pod.hostname = "db.example.com".into();
    });
    assert_eq!(way(&mesh, &client, "10.0.0.1:80").unwrap(), "db.example.com:8080");
    let (mesh, client) = self::mesh(|web, _| {
        web.load_balancing = Some(LoadBalancing {
            preference: Vec::new(),
            mode: Mode::Passthrough,
            health: crate::mesh::HealthPolicy::OnlyHealthy,
        });
    });
    assert_eq!(way(&mesh, &client, "10.0.0.1:80").unwrap(), "10.0.0.1:80");
}

#[test]
fn another_network_is_entered_through_its_gateway_with_a_tunnel_inside() {
    let other = |with_gateway: bool| {
        mesh(move |_, pod| {
            Arc::make_mut(&mut pod.facts).network = "other".into();
            pod.network_gateway = gateway(GatewayTarget::Service("app/wp".into())).filter(|_| with_gateway);
        })
    };
    let (mesh, client) = other(true);
    assert_eq!(
        way(&mesh, &client, "10.0.0.1:80").unwrap(),
        "10.1.0.9:15008 web:80 waypoint inside web:80 web"
    );
    // Its address means nothing here.
    assert_eq!(way(&mesh, &client, "10.1.0.1:8080").unwrap(), "10.1.0.1:8080");
    let (mesh, client) = other(false);
    assert!(matches!(
        way(&mesh, &client, "10.0.0.1:80"),
        Err(NoRoute::NoNetworkGateway { .. })
    ));
}

#[test]
fn our_own_ports_are_no_destination() {
    let (mesh, client) = mesh(|_, _| ());
    for target in [
        "10.1.0.5:15001",
        "10.1.0.5:15006",
        "10.1.0.5:15008",
        "127.0.0.1:15001",
        "[::1]:15008",
    ] {
        assert!(matches!(way(&mesh, &client, target), Err(NoRoute::Loop(_))), "{target}");
    }
}
