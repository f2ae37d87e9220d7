//! Routes: what each asks of a request and what becomes of it.

use std::fmt::{self, Write};

use cairn_policy::{
    headers::{HeaderEdits, Mutation},
    matcher::{
        HeaderMatch, HeaderMatcher, HeaderName, MetadataMatcher, PathMatch, PathMatcher, QueryMatch, QueryMatcher, StringMatch,
        StringMatcher,
    },
    rate_limit::RateLimits,
    retry::RetryPolicy,
    route::{
        Domain, Forward, Fraction, HashPolicy, HashSource, HostRewrite, Mirror, MirrorTarget, PathRewrite, Redirect,
        RedirectPath, Route, RouteAction, RouteMatch, RouteTable, Target, VirtualHost,
    },
    timeout::RouteTimeouts,
};

use super::{filters, limit, time};

pub(super) fn write_table(out: &mut String, table: &RouteTable) -> fmt::Result {
    write_edits(out, "request", &table.request_edits, 4)?;
    write_edits(out, "answer", &table.response_edits, 4)?;
    filters::write_overrides(out, &table.overrides, 4)?;
    for host in table.hosts() {
        let VirtualHost {
            name,
            domains,
            routes,
            request_edits,
            response_edits,
            overrides,
            rate_limits,
        } = &**host;
        let domains: Vec<_> = domains.iter().map(domain).collect();
        writeln!(out, "    virtual host {name} for {}", domains.join(", "))?;
        write_edits(out, "request", request_edits, 6)?;
        write_edits(out, "answer", response_edits, 6)?;
        filters::write_overrides(out, overrides, 6)?;
        filters::write_limits(out, rate_limits, 6)?;
        for route in routes {
            write_route(out, route)?;
        }
    }
    Ok(())
}

fn domain(domain: &Domain) -> String {
    match domain {
        Domain::Exact(whole) => whole.to_string(),
        Domain::Suffix(end) => format!("*{end}"),
        Domain::Prefix(start) => format!("{start}*"),
        Domain::Any => "*".to_owned(),
    }
}

fn write_route(out: &mut String, route: &Route) -> fmt::Result {
    let Route {
        name,
        matches,
        action,
        request_edits,
        response_edits,
        config,
        decorator,
        stat_prefix,
        overrides,
    } = route;
    let label = name.as_deref().map(|name| format!(" {name}")).unwrap_or_default();
    writeln!(out, "      route{label}: {}", conditions(matches))?;
    match action {
        RouteAction::Forward(forward) => write_forward(out, forward)?,
        RouteAction::Redirect(redirect) => writeln!(out, "        {}", redirect_words(redirect))?,
        RouteAction::DirectResponse(answer) => {
            let body = String::from_utf8_lossy(&answer.body);
            writeln!(out, "        answer {} {:?}", answer.status.as_u16(), body)?;
        }
    }
    write_edits(out, "request", request_edits, 8)?;
    write_edits(out, "answer", response_edits, 8)?;
    filters::write_overrides(out, overrides, 8)?;
    let decorator = decorator
        .as_ref()
        .map(|decorator| format!("operation {}", String::from_utf8_lossy(decorator.operation.as_bytes())));
    let words = [
        decorator,
        config.as_ref().map(|config| format!("from {config}")),
        stat_prefix.as_ref().map(|prefix| format!("statistics {prefix}")),
    ];
    let words: Vec<_> = words.into_iter().flatten().collect();
    if words.is_empty() {
        Ok(())
    } else {
        writeln!(out, "        {}", words.join(", "))
    }
}

fn conditions(matches: &RouteMatch) -> String {
    let RouteMatch {
        path,
        headers,
        query,
        metadata,
        grpc,
        fraction,
    } = matches;
    let mut words = vec![path_words(path)];
    words.extend(headers.iter().map(header));
    words.extend(query.iter().map(|QueryMatcher { name, how }| match how {
        QueryMatch::Present => format!("query {name}"),
        QueryMatch::String(how) => format!("query {name} {}", string(how)),
    }));
    words.extend(metadata.iter().map(
        |MetadataMatcher {
             filter,
             path,
             value,
             invert,
         }| {
            format!(
                "metadata {filter}/{} {}{value:?}",
                path.join("/"),
                if *invert { "not " } else { "" }
            )
        },
    ));
    words.extend(grpc.then(|| "gRPC".to_owned()));
    words.extend(fraction.map(|part| format!("{} of requests", share(part))));
    words.join(" and ")
}

fn path_words(path: &PathMatcher) -> String {
    let words = match path.how() {
        PathMatch::Exact(whole) => format!("path {whole}"),
        PathMatch::Prefix(start) => format!("path {start}*"),
        PathMatch::SeparatedPrefix(start) => format!("path {start} or {start}/*"),
        PathMatch::Regex(regex) => format!("path ~ {}", regex.pattern()),
        PathMatch::Connect => "CONNECT".to_owned(),
    };
    if path.ignores_case() {
        format!("{words} (any case)")
    } else {
        words
    }
}

fn header_name(name: &HeaderName) -> String {
    match name {
        HeaderName::Method => ":method".to_owned(),
        HeaderName::Authority => ":authority".to_owned(),
        HeaderName::Path => ":path".to_owned(),
        HeaderName::Scheme => ":scheme".to_owned(),
        HeaderName::Status => ":status".to_owned(),
        HeaderName::Field(name) => name.to_string(),
    }
}

fn header(matcher: &HeaderMatcher) -> String {
    let HeaderMatcher {
        name,
        how,
        invert,
        treat_missing_as_empty,
    } = matcher;
    let not = if *invert { "not " } else { "" };
    let missing = if *treat_missing_as_empty { " (missing is empty)" } else { "" };
    let how = match how {
        HeaderMatch::Present(true) => "present".to_owned(),
        HeaderMatch::Present(false) => "absent".to_owned(),
        HeaderMatch::String(how) => string(how),
        HeaderMatch::Range { start, end } => format!("in {start}..{end}"),
    };
    format!("header {} {not}{how}{missing}", header_name(name))
}

/// A string matcher in words.
pub(super) fn string(matcher: &StringMatcher) -> String {
    let words = match matcher.how() {
        StringMatch::Exact(whole) => format!("= {whole}"),
        StringMatch::Prefix(start) => format!("= {start}*"),
        StringMatch::Suffix(end) => format!("= *{end}"),
        StringMatch::Contains(part) => format!("= *{part}*"),
        StringMatch::Regex(regex) => format!("~ {}", regex.pattern()),
    };
    if matcher.ignores_case() {
        format!("{words} (any case)")
    } else {
        words
    }
}

fn share(fraction: Fraction) -> String {
    format!("{} of {}", fraction.numerator, fraction.denominator)
}

fn write_forward(out: &mut String, forward: &Forward) -> fmt::Result {
    let Forward {
        target,
        cluster_not_found,
        timeouts,
        retry,
        path_rewrite,
        host_rewrite,
        append_x_forwarded_host,
        hash_policies,
        asks,
        mirrors,
        upgrades,
        cors,
        rate_limits: RateLimits { own, include_host },
        high_priority,
    } = forward;
    let level = if *high_priority { ", high priority" } else { "" };
    if cors.is_some() {
        writeln!(out, "        cross-origin sharing of its own")?;
    }
    filters::write_limits(out, own, 8)?;
    if *include_host {
        writeln!(out, "        counts as the virtual host says, too")?;
    }
    match target {
        Target::Cluster(name) => writeln!(out, "        to {name} (without it {})", cluster_not_found.as_u16())?,
        Target::Weighted(weighted) => {
            for cluster in weighted.clusters() {
                writeln!(
                    out,
                    "        to {}, weight {} (without it {})",
                    cluster.name,
                    cluster.weight,
                    cluster_not_found.as_u16()
                )?;
                write_edits(out, "request", &cluster.request_edits, 10)?;
                write_edits(out, "answer", &cluster.response_edits, 10)?;
                filters::write_overrides(out, &cluster.overrides, 10)?;
                if let Some(asks) = &cluster.asks {
                    writeln!(out, "          endpoints with {asks}")?;
                }
                if let Some(host) = &cluster.host_rewrite {
                    writeln!(out, "          host {}", String::from_utf8_lossy(host.as_bytes()))?;
                }
            }
        }
    }
    writeln!(out, "        {}{level}", timeout_words(timeouts))?;
    if let Some(retry) = retry {
        writeln!(out, "        {}", retry_words(retry))?;
    }
    if let Some(rewrite) = path_rewrite {
        writeln!(out, "        {}", rewrite_words(rewrite))?;
    }
    if let Some(rewrite) = host_rewrite {
        let words = match rewrite {
            HostRewrite::Literal(host) => String::from_utf8_lossy(host.as_bytes()).into_owned(),
            HostRewrite::Header(name) => format!("from header {name}"),
            HostRewrite::Endpoint => "of the endpoint".to_owned(),
        };
        writeln!(
            out,
            "        host {words}{}",
            if *append_x_forwarded_host {
                ", the old one to x-forwarded-host"
            } else {
                ""
            }
        )?;
    }
    if let Some(asks) = asks {
        writeln!(out, "        endpoints with {asks}")?;
    }
    for mirror in mirrors {
        write_mirror(out, mirror)?;
    }
    for policy in hash_policies {
        writeln!(out, "        endpoint by {}", hash_words(policy))?;
    }
    for upgrade in upgrades {
        writeln!(
            out,
            "        upgrade {} {}",
            upgrade.kind,
            if upgrade.enabled { "taken" } else { "not taken" }
        )?;
    }
    Ok(())
}

fn timeout_words(timeouts: &RouteTimeouts) -> String {
    let RouteTimeouts {
        timeout,
        max_grpc_timeout,
        grpc_timeout_offset,
        idle,
        max_stream,
    } = timeouts;
    let mut words = format!("timeout {}", limit(*timeout));
    for (name, value) in [
        ("grpc-timeout up to", max_grpc_timeout),
        ("less", grpc_timeout_offset),
        ("idle", idle),
    ] {
        if let Some(value) = value {
            let value = if value.is_zero() { "any".to_owned() } else { time(*value) };
            words.push_str(&format!(", {name} {value}"));
        }
    }
    if let Some(most) = max_stream {
        words.push_str(&format!(
            ", stream {}, grpc-timeout up to {}",
            limit(most.duration),
            limit(most.grpc_timeout_max)
        ));
    }
    words
}

fn retry_words(retry: &RetryPolicy) -> String {
    let on: Vec<_> = retry.on.words().collect();
    let mut words = format!("{} retries on {}", retry.retries, on.join(","));
    if !retry.status_codes.is_empty() {
        let codes: Vec<_> = retry.status_codes.iter().map(|code| code.as_str().to_owned()).collect();
        words.push_str(&format!(" ({})", codes.join(",")));
    }
    if let Some(each) = retry.per_try_timeout {
        words.push_str(&format!(", each {}", time(each)));
    }
    if retry.avoid_previous_hosts {
        words.push_str(&format!(", elsewhere ({} choices)", retry.host_attempts));
    }
    if let Some(priorities) = retry.avoid_previous_priorities {
        words.push_str(&format!(", in other priorities ({})", priorities.update_frequency));
    }
    words.push_str(&format!(", first wait {}", time(retry.backoff.interval(0))));
    words
}

fn rewrite_words(rewrite: &PathRewrite) -> String {
    match rewrite {
        PathRewrite::Prefix(prefix) => format!("path prefix {prefix}"),
        PathRewrite::Regex(regex) => format!("path by ~ {}", regex.pattern()),
        PathRewrite::Full(path) => format!("path {path}"),
    }
}

fn redirect_words(redirect: &Redirect) -> String {
    let Redirect {
        status,
        scheme,
        host,
        port,
        path,
        strip_query,
    } = redirect;
    let mut words = format!("redirect {}", status.as_u16());
    if let Some(scheme) = scheme {
        words.push_str(&format!(", scheme {scheme:?}"));
    }
    if let Some(host) = host {
        words.push_str(&format!(", host {host}"));
    }
    if let Some(port) = port {
        words.push_str(&format!(", port {port}"));
    }
    match path {
        None => {}
        Some(RedirectPath::Full(path)) => words.push_str(&format!(", path {path}")),
        Some(RedirectPath::Rewrite(rewrite)) => words.push_str(&format!(", {}", rewrite_words(rewrite))),
    }
    if *strip_query {
        words.push_str(", without query");
    }
    words
}

fn hash_words(policy: &HashPolicy) -> String {
    let words = match &policy.source {
        HashSource::Header { name, rewrite: None } => format!("header {}", header_name(name)),
        HashSource::Header {
            name,
            rewrite: Some(rewrite),
        } => format!("header {} with {} replaced", header_name(name), rewrite.pattern()),
        HashSource::Cookie {
            name,
            ttl,
            path,
            attributes: _,
        } => match ttl {
            Some(ttl) => format!("cookie {name} (made for {path}, {ttl:?})"),
            None => format!("cookie {name}"),
        },
        HashSource::SourceIp => "client's address".to_owned(),
        HashSource::Query(name) => format!("query {name}"),
    };
    if policy.terminal {
        format!("{words}, if it is there")
    } else {
        words
    }
}

fn write_edits(out: &mut String, of: &str, edits: &HeaderEdits, depth: usize) -> fmt::Result {
    for name in edits.removals() {
        writeln!(out, "{:depth$}{of} header {name} removed", "")?;
    }
    for edit in edits.additions() {
        writeln!(out, "{:depth$}{of} {edit:?}", "")?;
    }
    Ok(())
}

fn write_mirror(out: &mut String, mirror: &Mirror) -> fmt::Result {
    let Mirror {
        to,
        fraction,
        shadow_host_suffix,
        host_rewrite,
        edits,
        trace_sampled: _,
    } = mirror;
    write!(out, "        copies of {} requests to ", share(*fraction))?;
    match to {
        MirrorTarget::Cluster(name) => write!(out, "{name}")?,
        MirrorTarget::Header(name) => write!(out, "the cluster that header {name} names")?,
    }
    match host_rewrite {
        Some(host) => write!(out, ", host {}", String::from_utf8_lossy(host.as_bytes()))?,
        None if *shadow_host_suffix => write!(out, ", host with -shadow")?,
        None => {}
    }
    writeln!(out)?;
    for edit in edits {
        match edit {
            Mutation::Edit(edits) => write_edits(out, "request", edits, 10)?,
            Mutation::RemoveMatching(matcher) => {
                writeln!(out, "          request without headers whose names match {matcher:?}")?
            }
        }
    }
    Ok(())
}
