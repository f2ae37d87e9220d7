//! Clusters and endpoints.

use std::fmt::{self, Write};

use cairn_policy::{
    balance::{Fallback, HashFunction, MOST_POINTS, RingSize, SlowStart},
    outlier::{OutlierSettings, Rule},
    retry::RetryBudget,
};

use super::{limit, time};
use cairn_identity::{NameMatcher, OriginationTerms};

use crate::upstream::{
    Breakers, Cluster, ClusterSettings, Discovery, Endpoint, EndpointSet, Hashing, Health, LbPolicy, LeastRequest, Locality,
    NamesByHost, ProxyHeader, Target, Thresholds, TransportTerms, UpstreamProtocol,
};

pub(super) fn write(out: &mut String, cluster: &Cluster) -> fmt::Result {
    let Cluster {
        facts,
        settings,
        transport_hash: _,
        state,
    } = cluster;
    writeln!(out, "  {}", facts.name)?;
    if let Some(service) = &facts.service {
        writeln!(out, "    service {} ({}/{})", service.host, service.namespace, service.name)?;
    }
    write_settings(out, settings)?;
    write_endpoints(out, &state.endpoints.load())
}

fn write_settings(out: &mut String, settings: &ClusterSettings) -> fmt::Result {
    let ClusterSettings {
        discovery,
        lb,
        hash_policies,
        mirrors,
        subsets,
        hashing,
        locality_weighted,
        panic_threshold,
        fail_on_panic,
        outlier,
        connect_timeout,
        protocol,
        transport,
        names_by_host,
        idle_timeout,
        max_connection_duration,
        max_requests_per_connection,
        http2_max_concurrent_streams,
        breakers,
        tunnel,
        tunnel_headers: _,
        tcp_keepalive,
        preserve_header_case,
        names,
    } = settings;
    let lb = match lb {
        LbPolicy::RoundRobin { slow_start } => format!("round robin{}", warming(slow_start.as_ref())),
        LbPolicy::LeastRequest(least) => least_words(least),
        LbPolicy::Random => "random".to_owned(),
        LbPolicy::RingHash(size) => ring_words(size),
        LbPolicy::Maglev { table_size } => format!("Maglev, {table_size}"),
        LbPolicy::ClusterProvided => "as discovered".to_owned(),
    };
    let discovery = match discovery {
        Discovery::Static => "static".to_owned(),
        Discovery::Eds(_) => "EDS".to_owned(),
        Discovery::OriginalDestination(original) => match original.port_override {
            Some(port) => format!("original destination, port {port}"),
            None => "original destination".to_owned(),
        },
        Discovery::StrictDns(_) => "DNS".to_owned(),
        Discovery::LogicalDns(_) => "DNS, first address".to_owned(),
        Discovery::DynamicForwardProxy(_) => "by host of the request".to_owned(),
    };
    let protocol = match protocol {
        UpstreamProtocol::Http1 => "HTTP/1.1",
        UpstreamProtocol::Http2 => "HTTP/2",
        UpstreamProtocol::Downstream => "HTTP as the client",
    };
    write!(
        out,
        "    {discovery}; {lb}; {protocol}; connect {}, idle {}",
        time(*connect_timeout),
        limit(*idle_timeout)
    )?;
    if let Some(most) = max_connection_duration {
        write!(out, ", connection {}", time(*most))?;
    }
    if let Some(most) = max_requests_per_connection {
        write!(out, ", {most} requests a connection")?;
    }
    if let Some(most) = http2_max_concurrent_streams {
        write!(out, ", {most} streams a connection")?;
    }
    if *locality_weighted {
        write!(out, "; localities by weight")?;
    }
    if *preserve_header_case {
        write!(out, "; header case kept")?;
    }
    let Hashing {
        by_hostname,
        balance_factor,
    } = hashing;
    if *by_hostname {
        write!(out, "; hashed by host name")?;
    }
    if *balance_factor > 0 {
        write!(out, "; at most {balance_factor} % of the average load")?;
    }
    if let Some(rules) = subsets {
        let selectors = rules.selectors.iter().map(|selector| selector.keys().join("+"));
        let selectors: Vec<_> = selectors.collect();
        let otherwise = match rules.fallback {
            Fallback::Nobody => "nobody",
            Fallback::All => "all",
            Fallback::Default => "the default subset",
        };
        write!(out, "; subsets by {}, otherwise {otherwise}", selectors.join(", "))?;
    }
    if !mirrors.is_empty() {
        write!(out, "; copies to {} mirrors of its own", mirrors.len())?;
    }
    if !hash_policies.is_empty() {
        write!(out, "; {} hash policies of its own", hash_policies.len())?;
    }
    let how = if *fail_on_panic { "refuses" } else { "panic" };
    writeln!(out, "; {how} below {panic_threshold} %")?;
    let Breakers {
        default,
        high,
        connections_per_endpoint,
    } = breakers;
    write_thresholds(out, "", default)?;
    if *high != Thresholds::default() {
        write_thresholds(out, " of high priority", high)?;
    }
    if let Some(most) = connections_per_endpoint {
        writeln!(out, "    at most {most} connections to an endpoint")?;
    }
    if let Some(outlier) = outlier {
        write_outlier(out, outlier)?;
    }
    if let Some(keepalive) = tcp_keepalive {
        let seconds = |time: Option<std::time::Duration>| time.map_or("system's".to_owned(), super::time);
        let probes = keepalive.probes.map_or("system's".to_owned(), |probes| probes.to_string());
        writeln!(
            out,
            "    TCP keepalive after {}, every {}, {probes} probes",
            seconds(keepalive.time),
            seconds(keepalive.interval)
        )?;
    }
    write_transport(out, transport)?;
    if *names_by_host != NamesByHost::default() {
        let what = [
            (names_by_host.server_name, "the server name"),
            (names_by_host.verify, "verified"),
        ];
        let what: Vec<_> = what.iter().filter(|(on, _)| *on).map(|(_, what)| *what).collect();
        writeln!(out, "    the request's host is {}", what.join(" and "))?;
    }
    if let Some(tunnel) = tunnel {
        let alpn: Vec<_> = tunnel.alpn.iter().map(|name| String::from_utf8_lossy(name)).collect();
        let who = tunnel.uri_san_prefixes.join("*, ") + "*";
        writeln!(
            out,
            "    tunnels to {who}; TLS {:?} to {:?}, ALPN {}",
            tunnel.min_version,
            tunnel.max_version,
            alpn.join(", ")
        )?;
    }
    for name in names {
        writeln!(out, "    name {}:{}, weight {}", name.host, name.port, name.weight)?;
    }
    Ok(())
}

fn write_transport(out: &mut String, transport: &TransportTerms) -> fmt::Result {
    match transport {
        TransportTerms::Raw => Ok(()),
        TransportTerms::Unsupported(reason) => writeln!(out, "    REFUSED: {reason}"),
        TransportTerms::Proxied(header, inner) => {
            let version = match header {
                ProxyHeader::V1 => 1,
                ProxyHeader::V2 { .. } => 2,
            };
            writeln!(out, "    PROXY protocol, version {version}")?;
            write_transport(out, inner)
        }
        TransportTerms::Tls(terms) => {
            let OriginationTerms {
                certificate,
                roots,
                revocation,
                revocation_of_leaf_only: _,
                names,
                server_name,
                min_version,
                max_version,
                cipher_suites: _,
                curves: _,
                alpn,
            } = &**terms;
            write!(out, "    TLS {min_version:?} to {max_version:?}")?;
            if let Some(name) = server_name {
                write!(out, ", server name {name}")?;
            }
            match roots {
                Some(roots) => write!(out, ", roots {roots}")?,
                None => write!(out, ", nobody verified")?,
            }
            for NameMatcher { pattern, .. } in names {
                write!(out, ", {pattern:?}")?;
            }
            if let Some(certificate) = certificate {
                write!(out, ", certificate {certificate}")?;
            }
            if let Some(revocation) = revocation {
                write!(out, ", revoked {revocation}")?;
            }
            if !alpn.is_empty() {
                let alpn: Vec<_> = alpn.iter().map(|name| String::from_utf8_lossy(name)).collect();
                write!(out, ", ALPN {}", alpn.join(", "))?;
            }
            writeln!(out)
        }
    }
}

fn warming(slow: Option<&SlowStart>) -> String {
    slow.map_or(String::new(), |slow| {
        let SlowStart {
            window,
            aggression,
            least,
        } = slow;
        format!(
            ", warming up for {} (aggression {aggression}, from {} %)",
            time(*window),
            least * 100.0
        )
    })
}

fn least_words(least: &LeastRequest) -> String {
    let LeastRequest {
        choices,
        bias,
        slow_start,
    } = least;
    let mut words = match choices {
        Some(choices) => format!("least request of {choices}"),
        None => "least request of all".to_owned(),
    };
    if *bias != 1.0 {
        words.push_str(&format!(", bias {bias}"));
    }
    words + &warming(slow_start.as_ref())
}

fn ring_words(size: &RingSize) -> String {
    let RingSize {
        minimum,
        maximum,
        function,
    } = size;
    let mut words = format!("ring hash, at least {minimum}");
    if *maximum != MOST_POINTS {
        words.push_str(&format!(", at most {maximum}"));
    }
    if *function == HashFunction::Murmur2 {
        words.push_str(", MurmurHash2");
    }
    words
}

fn write_thresholds(out: &mut String, of: &str, thresholds: &Thresholds) -> fmt::Result {
    let Thresholds {
        max_connections,
        max_pending_requests,
        max_requests,
        max_retries,
        retry_budget,
    } = thresholds;
    let retries = if retry_budget.is_some() { &u32::MAX } else { max_retries };
    let limits = [max_connections, max_pending_requests, max_requests, retries];
    let words = ["connections", "pending", "requests", "retries"].iter().zip(limits);
    let words = words.filter(|(_, limit)| **limit != u32::MAX);
    let mut words: Vec<_> = words.map(|(name, limit)| format!("{limit} {name}")).collect();
    if let Some(RetryBudget { percent, least }) = retry_budget {
        words.push(format!("{percent} % retries or {least}"));
    }
    if !words.is_empty() {
        writeln!(out, "    at most {}{of}", words.join(", "))?;
    }
    Ok(())
}

fn write_outlier(out: &mut String, outlier: &OutlierSettings) -> fmt::Result {
    let OutlierSettings {
        interval,
        base_time,
        max_time,
        max_jitter,
        max_percent,
        always_one,
        split,
        server_errors,
        gateway_errors,
        local_failures,
        success_rate,
        failure_percentage,
    } = outlier;
    let mut rules = Vec::new();
    let mut rule = |name: &str, rule: &Rule, counts: bool| {
        if counts && rule.consecutive > 0 && rule.enforcing > 0 {
            rules.push(format!("{} {name}", rule.consecutive));
        }
    };
    rule("5xx", server_errors, true);
    rule("gateway errors", gateway_errors, true);
    rule("failures to connect", local_failures, *split);
    if success_rate.enforcing > 0 || *split && success_rate.enforcing_local > 0 {
        rules.push(format!("{} deviations of the success rate", success_rate.deviations));
    }
    if failure_percentage.enforcing > 0 || *split && failure_percentage.enforcing_local > 0 {
        rules.push(format!("{} % failures", failure_percentage.threshold));
    }
    if rules.is_empty() {
        return writeln!(out, "    ejects nobody");
    }
    write!(
        out,
        "    ejects after {} for {} to {}",
        rules.join(", "),
        time(*base_time),
        time(*max_time)
    )?;
    if !max_jitter.is_zero() {
        write!(out, " and up to {} by chance", time(*max_jitter))?;
    }
    let one = if *always_one { ", always one" } else { "" };
    writeln!(out, ", at most {max_percent} %{one}; looks every {}", time(*interval))
}

fn write_endpoints(out: &mut String, set: &EndpointSet) -> fmt::Result {
    for (number, priority) in set.priorities.iter().enumerate() {
        for group in &priority.localities {
            for endpoint in group.endpoints.iter() {
                let Locality { region, zone, sub_zone } = &*group.locality;
                let place: Vec<_> = [region, zone, sub_zone]
                    .into_iter()
                    .filter(|part| !part.is_empty())
                    .map(|part| &**part)
                    .collect();
                write!(out, "    endpoint {}", target(endpoint))?;
                write!(out, ", priority {number}, weight {}", endpoint.weight)?;
                if !place.is_empty() {
                    write!(out, ", {} (weight {})", place.join("/"), group.weight)?;
                }
                writeln!(
                    out,
                    "{}",
                    match endpoint.health {
                        Health::Healthy => "",
                        Health::Degraded => ", degraded",
                        Health::Unhealthy => ", unhealthy",
                        Health::Draining => ", draining",
                    }
                )?;
            }
        }
    }
    Ok(())
}

fn target(endpoint: &Endpoint) -> String {
    match &endpoint.target {
        Target::Tunnel { address, gateway: None } => format!("{address} by tunnel"),
        Target::Tunnel {
            address,
            gateway: Some(gateway),
        } => format!("{address} by tunnel to {gateway}"),
        Target::Double { gateway, service } => format!("{service} by tunnel in a tunnel to {gateway}"),
        Target::Plain(address) => format!("{address} plainly"),
        Target::Original { tunnel: true } => "where the client wanted to go, by tunnel".to_owned(),
        Target::Original { tunnel: false } => "where the client wanted to go, plainly".to_owned(),
    }
}
