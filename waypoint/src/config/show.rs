//! The compiled configuration as a person wants to read it.
//!
//! What the proxy does is printed, not what istiod wrote: services with their ports, what each chain does, where routes lead, how
//! clusters are reached, and what is not supported. The order depends on nothing but the configuration, so that two versions can be
//! compared line by line.

mod cluster;
mod filters;
mod rbac;
mod route;

use std::{
    fmt::{self, Write},
    sync::Arc,
    time::Duration,
};

use cairn_filters::Filter;
use cairn_policy::headers::Sampling;
use cairn_telemetry::{
    istio::Rules,
    trace::{Provider, Tracer},
};

use crate::snapshot::{
    Chain, ChainKind, HttpChain, HttpSettings, ServerNameUse, Snapshot, TcpChain, Terminate,
    chain::Underscores,
    matcher::{Input, Node, Predicate},
};

use super::report::Unsupported;

/// Prints a snapshot and what of the configuration is not done.
pub fn show(snapshot: &Snapshot, unsupported: &[Unsupported]) -> String {
    let mut out = String::new();
    // Writing into a string cannot fail.
    let _ = write_all(&mut out, snapshot, unsupported);
    out
}

fn write_all(out: &mut String, snapshot: &Snapshot, unsupported: &[Unsupported]) -> fmt::Result {
    match &snapshot.terminate {
        Some(terminate) => tunnels(out, terminate)?,
        None => writeln!(out, "tunnels: not accepted, the listener connect_terminate is missing")?,
    }
    writeln!(out, "\nservices")?;
    match &snapshot.matcher {
        Some(node) => matcher(out, node, 1)?,
        None => writeln!(out, "  none: the listener main_internal is missing")?,
    }
    writeln!(out, "\nchains")?;
    for (_, one) in snapshot.chains.sorted() {
        chain(out, one)?;
    }
    writeln!(out, "\nclusters")?;
    for (_, one) in snapshot.clusters.sorted() {
        cluster::write(out, one)?;
    }
    let (workloads, services) = snapshot.workloads.counts();
    writeln!(out, "\nmesh: {workloads} workloads, {services} services")?;
    writeln!(out, "\nnot supported")?;
    if unsupported.is_empty() {
        writeln!(out, "  nothing: all of it is done")?;
    }
    for item in unsupported {
        writeln!(out, "  {item}")?;
    }
    Ok(())
}

fn tunnels(out: &mut String, terminate: &Terminate) -> fmt::Result {
    let Terminate {
        addresses,
        tls,
        max_concurrent_streams,
        keepalive,
        rbac,
        server: _,
        // They are opened only where something is served.
        access_logs: _,
        refuse,
    } = terminate;
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    writeln!(out, "tunnels on {}", addresses.join(", "))?;
    if let Some(refusal) = refuse {
        writeln!(out, "  REFUSED: {}", refusal.reason)?;
    }
    let who = if tls.uri_san_prefixes.is_empty() {
        "anybody of the trust bundle".to_owned()
    } else {
        tls.uri_san_prefixes.join("*, ") + "*"
    };
    let certificate = if tls.require_client_certificate {
        "certificate required"
    } else {
        "certificate optional"
    };
    let alpn: Vec<_> = tls.alpn.iter().map(|name| String::from_utf8_lossy(name)).collect();
    writeln!(
        out,
        "  clients: {who} ({certificate}); TLS {:?} to {:?}, ALPN {}",
        tls.min_version,
        tls.max_version,
        alpn.join(", ")
    )?;
    write!(out, "  {max_concurrent_streams} streams a tunnel")?;
    if let Some((interval, timeout)) = keepalive {
        write!(out, "; PING after {}, answer within {}", time(*interval), time(*timeout))?;
    }
    writeln!(out)?;
    rbac.iter().try_for_each(|filter| rbac::write(out, filter, 1))
}

/// A length of time.
fn time(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

/// A limit of time.
fn limit(duration: Option<Duration>) -> String {
    duration.map_or("none".to_owned(), time)
}

fn indent(out: &mut String, depth: usize) -> fmt::Result {
    write!(out, "{:1$}", "", 2 * depth)
}

fn input(input: &Input) -> &str {
    match input {
        Input::DestinationIp => "address",
        Input::DestinationPort => "port",
        Input::SourceIp => "client's address",
        Input::ApplicationProtocol => "protocol",
        Input::FilterState(key) => match &**key {
            "io.istio.connect_authority" => "authority",
            "io.istio.source" => "source",
            other => other,
        },
    }
}

fn matcher(out: &mut String, node: &Node, depth: usize) -> fmt::Result {
    let otherwise = match node {
        Node::Chain(name) => {
            indent(out, depth)?;
            return writeln!(out, "-> {name}");
        }
        Node::Refused => {
            indent(out, depth)?;
            return writeln!(out, "-> refused: not supported");
        }
        Node::Exact {
            input: of,
            map,
            otherwise,
        } => {
            let mut keys: Vec<_> = map.iter().collect();
            // Ports in order of their numbers.
            keys.sort_by_key(|(key, _)| (key.parse::<u32>().unwrap_or(u32::MAX), *key));
            for (key, next) in keys {
                branch(out, &format!("{} {key}", input(of)), next, depth)?;
            }
            otherwise
        }
        Node::Prefix {
            input: of,
            prefixes,
            otherwise,
        } => {
            for (prefix, next) in prefixes {
                branch(out, &format!("{} {prefix}*", input(of)), next, depth)?;
            }
            otherwise
        }
        Node::Ranges {
            input: of,
            ranges,
            otherwise,
        } => {
            for (nets, next) in ranges.iter() {
                let nets: Vec<_> = nets
                    .iter()
                    .map(|net| {
                        if net.prefix_len() == net.max_prefix_len() {
                            net.addr().to_string()
                        } else {
                            net.to_string()
                        }
                    })
                    .collect();
                let nets = if nets.is_empty() {
                    "(none)".to_owned()
                } else {
                    nets.join(", ")
                };
                branch(out, &format!("{} {nets}", input(of)), next, depth)?;
            }
            otherwise
        }
        Node::List { entries, otherwise } => {
            for (condition, next) in entries {
                branch(out, &predicate(condition), next, depth)?;
            }
            otherwise
        }
    };
    match otherwise {
        Some(next) => branch(out, "else", next, depth),
        None => Ok(()),
    }
}

fn branch(out: &mut String, label: &str, next: &Node, depth: usize) -> fmt::Result {
    indent(out, depth)?;
    match next {
        Node::Chain(name) => writeln!(out, "{label} -> {name}"),
        Node::Refused => writeln!(out, "{label} -> refused: not supported"),
        _ => {
            writeln!(out, "{label}")?;
            matcher(out, next, depth + 1)
        }
    }
}

fn predicate(condition: &Predicate) -> String {
    let join = |all: &[Predicate], word: &str| all.iter().map(predicate).collect::<Vec<_>>().join(word);
    match condition {
        Predicate::Text(of, how) => format!("{} {}", input(of), route::string(how)),
        Predicate::All(all) => format!("({})", join(all, " and ")),
        Predicate::Any(any) => format!("({})", join(any, " or ")),
        Predicate::Not(inner) => format!("not {}", predicate(inner)),
    }
}

fn chain(out: &mut String, chain: &Chain) -> fmt::Result {
    let Chain {
        name,
        service_port,
        kind,
        refuse,
    } = chain;
    let kind_name = match kind {
        ChainKind::Http(_) | ChainKind::Refused { http: true } => "HTTP",
        ChainKind::Tcp(_) | ChainKind::Refused { http: false } => "TCP",
    };
    writeln!(out, "  {name} ({kind_name}, port {service_port})")?;
    if let Some(refusal) = refuse {
        writeln!(out, "    REFUSED: {}", refusal.reason)?;
    }
    match kind {
        ChainKind::Http(http) => write_http(out, http),
        ChainKind::Tcp(tcp) => write_tcp(out, tcp),
        ChainKind::Refused { .. } => Ok(()),
    }
}

fn write_http(out: &mut String, chain: &HttpChain) -> fmt::Result {
    let HttpChain {
        settings,
        filters,
        routes,
        access_logs,
        tracer,
        metrics,
        shared: _,
    } = chain;
    write_settings(out, settings)?;
    let names: Vec<_> = filters.names().collect();
    let logs = if access_logs.is_empty() { "none" } else { "yes" };
    let names = if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    };
    writeln!(
        out,
        "    filters: {names}; metrics: {}; access logs: {logs}",
        counted(metrics)
    )?;
    if let Some(tracer) = tracer.as_ref().filter(|tracer| !matches!(tracer.provider, Provider::None)) {
        write_tracer(out, tracer, &settings.sampling)?;
    }
    for filter in filters.iter() {
        if let Filter::Rbac(filter) = filter {
            rbac::write(out, filter, 2)?;
        }
    }
    route::write_table(out, routes)
}

/// Whether Istio's metrics are counted.
fn counted(filters: &[Option<Arc<Rules>>]) -> &'static str {
    match filters {
        [] => "none",
        filters if filters.iter().any(Option::is_some) => "yes, changed",
        _ => "yes",
    }
}

fn write_tracer(out: &mut String, tracer: &Tracer, sampling: &Sampling) -> fmt::Result {
    let provider = match &tracer.provider {
        Provider::None => "nobody",
        Provider::OpenTelemetry { .. } => "OpenTelemetry",
        Provider::Zipkin { .. } => "Zipkin",
    };
    let share = if sampling.by_request_id {
        format!("{} of ten thousand", sampling.random)
    } else {
        "all".to_owned()
    };
    writeln!(out, "    traces: to {provider}, {share}, {} tags", tracer.tags.len())
}

/// Prints what differs from the defaults of Envoy.
fn write_settings(out: &mut String, settings: &HttpSettings) -> fmt::Result {
    let HttpSettings {
        path,
        incoming,
        server,
        websocket,
        upgrades,
        http2_extended_connect,
        accept_http10,
        preserve_header_case,
        proxy_100_continue,
        suppress_envoy_headers,
        underscores,
        max_request_head,
        max_request_headers,
        stream_idle_timeout,
        request_timeout,
        request_headers_timeout,
        idle_timeout,
        max_connection_duration,
        max_stream_duration,
        http2_max_concurrent_streams,
        http2_stream_window,
        http2_connection_window,
        sampling,
    } = settings;
    let mut words = vec![format!("path {path:?}"), format!("server {server:?}")];
    let mut flag = |on: bool, word: &str| {
        if on {
            words.push(word.to_owned());
        }
    };
    flag(*websocket, "websocket");
    flag(*http2_extended_connect, "extended CONNECT");
    flag(*accept_http10, "HTTP/1.0");
    flag(*preserve_header_case, "header case kept");
    flag(*proxy_100_continue, "100-continue passed on");
    flag(*suppress_envoy_headers, "no x-envoy-*");
    flag(!incoming.generate_request_id, "no request id");
    flag(!sampling.tell, "no trace reason in request id");
    flag(incoming.append_forwarded_port, "x-forwarded-port");
    flag(incoming.forward_client_cert, "x-forwarded-client-cert kept");
    flag(*underscores == Underscores::Reject, "underscores refused");
    flag(*underscores == Underscores::Drop, "underscores dropped");
    if incoming.trusted_hops > 0 {
        words.push(format!("{} trusted hops", incoming.trusted_hops));
    }
    words.extend(upgrades.iter().map(|kind| format!("upgrade {kind}")));
    writeln!(out, "    {}", words.join(", "))?;
    let times = [
        ("stream idle", stream_idle_timeout),
        ("request", request_timeout),
        ("head", request_headers_timeout),
        ("idle", idle_timeout),
        ("connection", max_connection_duration),
        ("stream", max_stream_duration),
    ];
    let times: Vec<_> = times.iter().map(|(name, time)| format!("{name} {}", limit(**time))).collect();
    write!(
        out,
        "    limits: {}; head {max_request_head} bytes, {max_request_headers} fields",
        times.join(", ")
    )?;
    let numbers = [
        ("streams", http2_max_concurrent_streams),
        ("stream window", http2_stream_window),
        ("connection window", http2_connection_window),
    ];
    for (name, number) in numbers {
        if let Some(number) = number {
            write!(out, ", {name} {number}")?;
        }
    }
    writeln!(out)
}

fn write_tcp(out: &mut String, chain: &TcpChain) -> fmt::Result {
    let TcpChain {
        targets,
        total_weight,
        idle_timeout,
        max_duration,
        hash_source_ip,
        access_logs,
        metrics,
        metric_rules,
        rbac,
        authorizers,
        limits,
        server_name: ServerNameUse { judged, forward_to },
    } = chain;
    if *judged {
        writeln!(out, "    server names of TLS are judged")?;
    }
    if let Some(port) = forward_to {
        writeln!(out, "    forwarded to the server name of TLS, port {port}")?;
    }
    rbac.iter().try_for_each(|filter| rbac::write(out, filter, 2))?;
    for authorizer in authorizers {
        let otherwise = if authorizer.allow_on_failure { "passes" } else { "is refused" };
        writeln!(
            out,
            "    the authorizer is {}; without its answer a connection {otherwise}",
            authorizer.service.cluster
        )?;
    }
    for limit in limits {
        writeln!(
            out,
            "    at most {} new connections at once, {} a second",
            limit.room(),
            limit.rate()
        )?;
    }
    match targets.as_slice() {
        [(only, _)] => writeln!(out, "    to {only}")?,
        several => {
            for (name, weight) in several {
                writeln!(out, "    to {name} ({weight} of {total_weight})")?;
            }
        }
    }
    let by = if *hash_source_ip {
        "; endpoint by client's address"
    } else {
        ""
    };
    let logs = if access_logs.is_empty() { "none" } else { "yes" };
    let changed = if counted(metric_rules) == "yes, changed" {
        ", changed"
    } else {
        ""
    };
    let metrics = metrics.map_or("none".to_owned(), |every| format!("every {}{changed}", time(every)));
    writeln!(
        out,
        "    idle {}, at most {}{by}; metrics: {metrics}; access logs: {logs}",
        limit(*idle_timeout),
        limit(*max_duration)
    )
}
