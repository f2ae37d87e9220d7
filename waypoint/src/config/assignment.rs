//! Endpoint assignments (contract xds §5.10): the endpoints of a cluster by priority and locality.
//!
//! istiod sends an assignment whole when one endpoint of it has changed. The bytes of each endpoint are compared with those of the
//! assignment before; what has not changed is taken over as it was compiled, so that a change among ten thousand endpoints costs
//! little more than finding it.

use std::sync::Arc;

use bytes::Bytes;
use cairn_proto::envoy::{
    config::{
        core::v3::Locality as EnvoyLocality,
        endpoint::v3::{
            ClusterLoadAssignment, LbEndpoint, LocalityLbEndpoints,
            cluster_load_assignment::{Policy, policy::DropOverload},
        },
    },
    r#type::v3::{FractionalPercent, fractional_percent::DenominatorType},
};

use super::{
    any::{Unknown, decode},
    endpoint::{Reached, compile_endpoint},
    report::{Malformed, Notes, Unsupported, ignore_set, refuse_set, unneeded},
    wire::{self, AssignmentParts, LocalityParts},
};
use crate::upstream::{Locality, NamedEndpoint};

/// Highest priority that an assignment may have, as Envoy's validation says.
const MAX_PRIORITY: u32 = 128;

/// A compiled assignment, before live state is put to it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Assignment {
    /// Endpoints by priority and locality.
    pub groups: Vec<Group>,
    /// Endpoints that have a host name instead of an address.
    pub names: Vec<NamedEndpoint>,
    /// Percent by which healthy endpoints count for more, where it is told.
    pub overprovisioning: Option<u32>,
    /// Share of requests that are dropped, of a million.
    pub dropped: u32,
}

/// Endpoints of one locality in one priority.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    /// The priority, 0 first.
    pub priority: usize,
    /// The locality.
    pub locality: Arc<Locality>,
    /// Its weight among those of the priority.
    pub weight: u32,
    /// One for each that istiod names; `None` for those that are left out.
    pub endpoints: Vec<Option<Reached>>,
}

/// The last good assignment of a name that came over EDS.
#[derive(Debug)]
pub(crate) struct Delivered {
    /// What it means.
    pub assignment: Assignment,
    /// What of it is not done.
    pub unsupported: Vec<Unsupported>,
    bytes: Bytes,
    parts: AssignmentParts,
}

/// A group of which a part is taken from the assignment before.
struct Draft {
    group: Group,
    kept: Option<Kept>,
}

/// What of a group goes on: so many endpoints at both of its ends.
#[derive(Clone, Copy)]
struct Kept {
    group: usize,
    first: usize,
    last: usize,
}

// === impl Delivered ===

impl Delivered {
    /// Compiles what came; `last` becomes that, or stays when it is malformed.
    pub(crate) fn renew(last: &mut Option<Self>, name: &str, bytes: &Bytes) -> Result<(), Malformed> {
        let mut notes = Notes::of(name);
        let parts =
            wire::split_assignment(bytes).map_err(|error| notes.malformed("", format!("is no endpoint assignment: {error}")))?;
        let head: ClusterLoadAssignment = decode(&parts.rest, Unknown::Refuses, &mut notes)?;
        if head.cluster_name != name {
            return Err(notes.malformed(
                "cluster_name",
                format!("`{}` is not the name of the resource", head.cluster_name),
            ));
        }
        let mut assignment = compile_head(head, &mut notes)?;
        // What was said of an endpoint names its place in the list, which moves.
        let before = last
            .as_ref()
            .filter(|last| last.unsupported.is_empty() && last.assignment.names.is_empty());
        let mut drafts: Vec<Draft> = Vec::with_capacity(parts.localities.len());
        for (index, locality) in parts.localities.iter().enumerate() {
            let kept = before.and_then(|before| before.keep(bytes, locality, &drafts));
            let draft = notes.at("endpoints", index, |notes| {
                Draft::new(bytes, locality, kept, &mut assignment.names, notes)
            })?;
            drafts.push(draft);
        }
        if !assignment.names.is_empty() {
            notes.refuse(
                "endpoints",
                "endpoints over EDS need addresses; those with names are left out",
            );
        }
        let mut before = last.take();
        assignment.groups = drafts.into_iter().map(|draft| draft.finish(before.as_mut())).collect();
        *last = Some(Self {
            assignment,
            unsupported: notes.into_list(),
            bytes: bytes.clone(),
            parts,
        });
        Ok(())
    }

    /// What of this assignment a locality of the next one has too. Each of ours is kept by one of them.
    fn keep(&self, bytes: &[u8], next: &LocalityParts, drafts: &[Draft]) -> Option<Kept> {
        let taken = |group: usize| {
            let kept = |draft: &Draft| draft.kept.is_some_and(|kept| kept.group == group);
            drafts.iter().any(kept)
        };
        let mut ours = self.parts.localities.iter().enumerate();
        let (group, ours) = ours.find(|(group, ours)| ours.rest == next.rest && !taken(*group))?;
        let (ours, next) = (&ours.endpoints, &next.endpoints);
        let first = std::iter::zip(ours, next)
            .take_while(|(ours, next)| ours.of(&self.bytes) == next.of(bytes))
            .count();
        let last = std::iter::zip(ours.iter().skip(first).rev(), next.iter().skip(first).rev())
            .take_while(|(ours, next)| ours.of(&self.bytes) == next.of(bytes))
            .count();
        Some(Kept { group, first, last })
    }
}

// === impl Draft ===

impl Draft {
    /// Compiles what of a locality is new.
    fn new(
        bytes: &[u8],
        parts: &LocalityParts,
        kept: Option<Kept>,
        names: &mut Vec<NamedEndpoint>,
        notes: &mut Notes,
    ) -> Result<Self, Malformed> {
        let head: LocalityLbEndpoints = decode(&parts.rest, Unknown::Refuses, notes)?;
        let mut group = compile_group(head, notes)?;
        let (first, last) = kept.map_or((0, 0), |kept| (kept.first, kept.last));
        let new = parts.endpoints.len().saturating_sub(first + last);
        for (index, place) in parts.endpoints.iter().enumerate().skip(first).take(new) {
            let endpoint = notes.at("lb_endpoints", index, |notes| {
                let endpoint: LbEndpoint = decode(place.of(bytes), Unknown::Refuses, notes)?;
                compile_endpoint(endpoint, &group, names, notes)
            })?;
            group.endpoints.push(endpoint);
        }
        Ok(Self { group, kept })
    }

    /// Puts the new endpoints between those that go on.
    fn finish(self, before: Option<&mut Delivered>) -> Group {
        let Self { mut group, kept } = self;
        let of = before.zip(kept);
        if let Some((before, kept)) = of
            && let Some(old) = before.assignment.groups.get_mut(kept.group)
        {
            let mut endpoints = std::mem::take(&mut old.endpoints);
            let changed = kept.first..endpoints.len().saturating_sub(kept.last);
            endpoints.splice(changed, group.endpoints);
            group.endpoints = endpoints;
        }
        group
    }
}

// === impl Assignment ===

impl Assignment {
    /// Compiles an assignment that is a part of its cluster.
    pub(crate) fn compile(mut message: ClusterLoadAssignment, notes: &mut Notes) -> Result<Self, Malformed> {
        let localities = std::mem::take(&mut message.endpoints);
        let mut compiled = compile_head(message, notes)?;
        for (index, mut locality) in localities.into_iter().enumerate() {
            let group = notes.at("endpoints", index, |notes| {
                let endpoints = std::mem::take(&mut locality.lb_endpoints);
                let mut group = compile_group(locality, notes)?;
                for (index, endpoint) in endpoints.into_iter().enumerate() {
                    let endpoint = notes.at("lb_endpoints", index, |notes| {
                        compile_endpoint(endpoint, &group, &mut compiled.names, notes)
                    })?;
                    group.endpoints.push(endpoint);
                }
                Ok(group)
            })?;
            compiled.groups.push(group);
        }
        Ok(compiled)
    }

    /// The only "endpoint" of a cluster that goes where the client wanted to go.
    pub(crate) fn original_destination(tunnel: bool) -> Self {
        let group = Group {
            priority: 0,
            locality: Arc::default(),
            weight: 1,
            endpoints: vec![Some(Reached::original_destination(tunnel))],
        };
        Self {
            groups: vec![group],
            ..Self::default()
        }
    }
}

/// What an assignment says of all of its endpoints.
fn compile_head(message: ClusterLoadAssignment, notes: &mut Notes) -> Result<Assignment, Malformed> {
    let ClusterLoadAssignment {
        cluster_name: _,
        endpoints: _,
        named_endpoints,
        policy,
    } = message;
    refuse_set!(notes, named_endpoints);
    let mut compiled = Assignment::default();
    if let Some(Policy {
        drop_overloads,
        overprovisioning_factor,
        endpoint_stale_after,
        weighted_priority_health,
    }) = policy
    {
        unneeded!(endpoint_stale_after);
        ignore_set!(notes, weighted_priority_health);
        if overprovisioning_factor == Some(0) {
            return Err(notes.malformed("policy.overprovisioning_factor", "is zero"));
        }
        compiled.overprovisioning = overprovisioning_factor;
        compiled.dropped = drop_share(drop_overloads, notes)?;
    }
    Ok(compiled)
}

/// The share of requests that are dropped, of a million. Envoy takes one category and rejects more.
fn drop_share(overloads: Vec<DropOverload>, notes: &Notes) -> Result<u32, Malformed> {
    let share = match <[DropOverload; 1]>::try_from(overloads) {
        Ok(
            [
                DropOverload {
                    category: _,
                    drop_percentage,
                },
            ],
        ) => drop_percentage,
        Err(none) if none.is_empty() => None,
        Err(_) => return Err(notes.malformed("policy.drop_overloads", "there is more than one")),
    };
    let Some(FractionalPercent { numerator, denominator }) = share else {
        return Ok(0);
    };
    let scale = match DenominatorType::try_from(denominator) {
        Ok(DenominatorType::Hundred) => 10_000,
        Ok(DenominatorType::TenThousand) => 100,
        Ok(DenominatorType::Million) => 1,
        Err(_) => return Err(notes.malformed("policy.drop_overloads", format!("{denominator} is no denominator"))),
    };
    Ok(numerator.saturating_mul(scale).min(1_000_000))
}

/// What a locality says of all of its endpoints.
fn compile_group(message: LocalityLbEndpoints, notes: &mut Notes) -> Result<Group, Malformed> {
    let LocalityLbEndpoints {
        locality,
        metadata,
        lb_endpoints: _,
        load_balancing_weight,
        priority,
        proximity,
        lb_config,
    } = message;
    unneeded!(metadata, proximity);
    refuse_set!(notes, lb_config);
    if priority > MAX_PRIORITY {
        return Err(notes.malformed("priority", format!("{priority} is more than {MAX_PRIORITY}")));
    }
    let EnvoyLocality { region, zone, sub_zone } = locality.unwrap_or_default();
    Ok(Group {
        priority: priority as usize,
        locality: Arc::new(Locality {
            region: region.into(),
            zone: zone.into(),
            sub_zone: sub_zone.into(),
        }),
        // Without a weight a locality gets no share where localities are weighted, as in Envoy.
        weight: load_balancing_weight.unwrap_or(0),
        endpoints: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use cairn_proto::envoy::config::{
        core::v3::{Address, SocketAddress, address, socket_address::PortSpecifier},
        endpoint::v3::{Endpoint as EnvoyEndpoint, lb_endpoint::HostIdentifier},
    };
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    fn endpoint(number: u8, weight: u32) -> LbEndpoint {
        let address = address::Address::SocketAddress(SocketAddress {
            address: format!("10.0.0.{number}"),
            port_specifier: Some(PortSpecifier::PortValue(80)),
            ..Default::default()
        });
        LbEndpoint {
            load_balancing_weight: Some(weight),
            host_identifier: Some(HostIdentifier::Endpoint(EnvoyEndpoint {
                address: Some(Address { address: Some(address) }),
                ..Default::default()
            })),
            ..Default::default()
        }
    }

    type Localities = Vec<(u32, Vec<(u8, u32)>)>;

    fn bytes(localities: &Localities) -> Bytes {
        let locality = |(priority, endpoints): &(u32, Vec<(u8, u32)>)| LocalityLbEndpoints {
            priority: *priority,
            lb_endpoints: endpoints.iter().map(|(number, weight)| endpoint(*number, *weight)).collect(),
            ..Default::default()
        };
        let message = ClusterLoadAssignment {
            cluster_name: "web".into(),
            endpoints: localities.iter().map(locality).collect(),
            ..Default::default()
        };
        message.encode_to_vec().into()
    }

    fn localities() -> impl Strategy<Value = Localities> {
        prop::collection::vec((0..3_u32, prop::collection::vec((0..9_u8, 1..3_u32), 0..8)), 0..4)
    }

    proptest! {
        #[test]
        fn what_is_taken_over_comes_out_as_compiled_anew(versions in prop::collection::vec(localities(), 1..4)) {
            let mut last = None;
            for version in versions {
                let bytes = bytes(&version);
                Delivered::renew(&mut last, "web", &bytes).unwrap();
                let mut anew = None;
                Delivered::renew(&mut anew, "web", &bytes).unwrap();
                let words = |of: &Option<Delivered>| format!("{:?}", of.as_ref().map(|of| &of.assignment));
                prop_assert_eq!(words(&last), words(&anew));
            }
        }
    }

    #[test]
    fn an_endpoint_that_has_not_changed_is_not_compiled_again() {
        let displays = |of: &Option<Delivered>| -> Vec<Arc<str>> {
            let groups = of.iter().flat_map(|of| &of.assignment.groups);
            groups
                .flat_map(|group| group.endpoints.iter().flatten().map(|endpoint| endpoint.display.clone()))
                .collect()
        };
        let mut last = None;
        Delivered::renew(&mut last, "web", &bytes(&vec![(0, vec![(1, 1), (2, 1), (3, 1)])])).unwrap();
        let before = displays(&last);
        Delivered::renew(&mut last, "web", &bytes(&vec![(0, vec![(1, 1), (2, 5), (3, 1)])])).unwrap();
        let same: Vec<bool> = std::iter::zip(before, displays(&last))
            .map(|(before, now)| Arc::ptr_eq(&before, &now))
            .collect();
        assert_eq!(same, [true, false, true]);
    }

    #[test]
    fn a_malformed_assignment_leaves_the_one_before_whole() {
        let mut last = None;
        Delivered::renew(&mut last, "web", &bytes(&vec![(0, vec![(1, 1), (2, 1)])])).unwrap();
        let error = Delivered::renew(&mut last, "web", &bytes(&vec![(0, vec![(1, 1), (2, 1)]), (129, vec![])])).unwrap_err();
        assert_eq!(error.to_string(), "endpoints[1].priority: 129 is more than 128");
        let kept = last.map(|last| {
            last.assignment
                .groups
                .iter()
                .map(|group| group.endpoints.len())
                .sum::<usize>()
        });
        assert_eq!(kept, Some(2));
    }
}
