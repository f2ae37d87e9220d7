//! Traces (contract runtime §7.6): which requests are traced, what their spans tell, and whom.
//!
//! A trace decides nothing, so nothing here refuses traffic. A collector that we cannot speak to is listed; the decision is made and
//! told in the request's id all the same, and what requests bring of other systems' contexts passes.

use std::{path::Path, time::Duration};

use cairn_exchange::format::Template;
use cairn_policy::headers::Sampling;
use cairn_proto::envoy::{
    config::{
        core::v3::{HeaderValue as EnvoyHeader, HttpService, HttpUri, TypedExtensionConfig, http_uri::HttpUpstreamType},
        trace::v3::{
            OpenTelemetryConfig, ZipkinConfig,
            tracing::{Http as Provided, http::ConfigType},
            zipkin_config::{CollectorEndpointVersion, TraceContextOption},
        },
    },
    extensions::{
        filters::network::http_connection_manager::v3::http_connection_manager::Tracing,
        tracers::opentelemetry::resource_detectors::v3::StaticConfigResourceDetectorConfig,
    },
    r#type::{
        metadata::v3::{MetadataKey, metadata_key::path_segment::Segment, metadata_kind::Kind},
        tracing::v3::{
            CustomTag as EnvoyTag,
            custom_tag::{Environment, Header, Literal, Metadata, Type},
        },
        v3::Percent,
    },
};
use cairn_telemetry::{
    export::{Envelope, Exporter, Limits, Spec},
    trace::{CustomTag, Propagation, Provider, TagValue, Tracer, otlp},
};
use http::{HeaderMap, HeaderName, HeaderValue, header, uri::PathAndQuery};

use super::{
    any::{Typed, Unknown, type_name, typed, unpack},
    chain::Context,
    grpc_service,
    report::{Malformed, Notes, ignore_set, unneeded},
    value::duration,
};
use crate::export::{Destination, Server, TIMEOUT};

/// Bytes of a path where the configuration does not say.
const MAX_PATH: usize = 256;
/// Spans that wait for a collector where the configuration does not say.
const MAX_WAITING: usize = 1024;
/// Where Dynatrace's agents write who we are: files of their own, and one that names a file.
const DYNATRACE: [&str; 3] = [
    "dt_metadata_e617c525669e072eebe3d0f08212e8f2.properties",
    "/var/lib/dynatrace/enrichment/dt_metadata.properties",
    "/var/lib/dynatrace/enrichment/dt_host_metadata.properties",
];

/// Compiles the traces of a chain.
pub(crate) fn compile(
    tracing: Tracing,
    sampling: &mut Sampling,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<Box<Tracer>, Malformed> {
    let Tracing {
        client_sampling,
        random_sampling,
        overall_sampling,
        verbose,
        max_path_tag_length,
        custom_tags,
        provider,
        spawn_upstream_span,
        operation,
        upstream_operation,
        no_context_propagation,
    } = tracing;
    // Envoy's own units: hundredths, and for chance one in ten thousand; a percentage out of range is cut.
    let percent = |of: Option<Percent>, all: f64| of.map_or(all, |percent| percent.value / 100.0 * all).clamp(0.0, all) as u32;
    sampling.client = percent(client_sampling, 100.0);
    sampling.random = percent(random_sampling, 10_000.0);
    sampling.overall = percent(overall_sampling, 100.0);
    let mut tags = Vec::new();
    for (index, tag) in custom_tags.into_iter().enumerate() {
        tags.extend(notes.at("custom_tags", index, |notes| custom_tag(tag, notes))?);
    }
    Ok(Box::new(Tracer {
        provider: match provider {
            // Without one nothing is told, whatever tags istiod has written.
            None => Provider::None,
            Some(provider) => notes.within("provider", |notes| compile_provider(provider, context, notes))?,
        },
        tags: tags.into(),
        operation: name("operation", &operation, notes)?,
        upstream_operation: name("upstream_operation", &upstream_operation, notes)?,
        max_path: max_path_tag_length
            .and_then(|length| usize::try_from(length).ok())
            .unwrap_or(MAX_PATH),
        verbose,
        upstream_spans: spawn_upstream_span == Some(true),
        propagate: !no_context_propagation,
    }))
}

fn name(field: &str, format: &str, notes: &mut Notes) -> Result<Option<Template>, Malformed> {
    if format.is_empty() {
        return Ok(None);
    }
    template(field, format, notes).map(Some)
}

/// A format string; operators that have no value here are listed.
fn template(field: &str, format: &str, notes: &mut Notes) -> Result<Template, Malformed> {
    let template = Template::parse_log(format).map_err(|error| notes.malformed(field, error.to_string()))?;
    for operator in template.unrecorded() {
        notes.ignore(field, format!("%{operator}% has no value here"));
    }
    Ok(template)
}

fn custom_tag(tag: EnvoyTag, notes: &mut Notes) -> Result<Option<CustomTag>, Malformed> {
    let EnvoyTag { tag: name, r#type } = tag;
    let value = match r#type {
        None => return Err(notes.malformed("", format!("tag {name} has no value"))),
        Some(Type::Literal(Literal { value })) => TagValue::Literal(value.into()),
        Some(Type::Environment(Environment { name, default_value })) => {
            TagValue::Literal(environment(&name).unwrap_or(default_value).into())
        }
        Some(Type::RequestHeader(Header { name, default_value })) => {
            let field = HeaderName::try_from(&name)
                .map_err(|_| notes.malformed("request_header.name", format!("`{name}` is no header name")))?;
            TagValue::Header(field, default_value.into())
        }
        Some(Type::Value(format)) => TagValue::Format(template("value", &format, notes)?),
        Some(Type::Metadata(Metadata {
            kind,
            metadata_key,
            default_value,
        })) => {
            let kind = kind.and_then(|kind| kind.kind);
            if !matches!(kind, Some(Kind::Request(_)) | None) {
                notes.ignore("metadata.kind", format!("tag {name} is about metadata that is not kept"));
                TagValue::Literal(default_value.into())
            } else {
                let MetadataKey { key, path } = metadata_key.unwrap_or_default();
                let path = path.into_iter().filter_map(|segment| segment.segment);
                let path = path.map(|Segment::Key(key)| key);
                TagValue::Metadata(Template::of_metadata(&key, path), default_value.into())
            }
        }
    };
    Ok(Some(CustomTag {
        name: name.into(),
        value,
    }))
}

fn compile_provider(provider: Provided, context: &mut Context, notes: &mut Notes) -> Result<Provider, Malformed> {
    let Provided { name, config_type } = provider;
    let Some(ConfigType::TypedConfig(any)) = config_type else {
        return Err(notes.malformed("", format!("{name} has no configuration")));
    };
    match typed(&any, notes)? {
        Typed::Message("envoy.config.trace.v3.OpenTelemetryConfig", any) => {
            open_telemetry(unpack(any, Unknown::Ignored, notes)?, context, notes)
        }
        Typed::Message("envoy.config.trace.v3.ZipkinConfig", any) => {
            zipkin(unpack(any, Unknown::Ignored, notes)?, context, notes)
        }
        other => {
            let what = format!(
                "traces to {name} ({}) are not sent; what requests bring of them passes",
                other.name()
            );
            notes.ignore("", what);
            Ok(Provider::None)
        }
    }
}

fn open_telemetry(config: OpenTelemetryConfig, context: &mut Context, notes: &mut Notes) -> Result<Provider, Malformed> {
    let OpenTelemetryConfig {
        grpc_service,
        http_service,
        service_name,
        resource_detectors,
        sampler,
        max_cache_size,
        set_telemetry_sdk_resource_attributes,
        set_service_name_resource_attribute,
    } = config;
    let mut facts = Vec::new();
    if set_telemetry_sdk_resource_attributes != Some(false) {
        facts.extend([("telemetry.sdk.language", "rust"), ("telemetry.sdk.name", "cairn")].map(owned));
        facts.push(owned(("telemetry.sdk.version", env!("CARGO_PKG_VERSION"))));
    }
    for detector in resource_detectors {
        for (key, value) in notes.within("resource_detectors", |notes| detect(detector, notes))? {
            facts.retain(|(known, _)| *known != key);
            facts.push((key, value));
        }
    }
    if set_service_name_resource_attribute != Some(false)
        && !facts.iter().any(|(key, _)| key == "service.name" && service_name.is_empty())
    {
        let name = if service_name.is_empty() {
            "unknown_service:envoy"
        } else {
            &service_name
        };
        facts.retain(|(key, _)| key != "service.name");
        facts.insert(0, owned(("service.name", name)));
    }
    let destination = match (grpc_service, http_service) {
        (Some(service), _) => notes.within("grpc_service", |notes| {
            let timeout = service
                .timeout
                .map(|timeout| duration("timeout", timeout, notes))
                .transpose()?;
            let service = grpc_service::collector(service, timeout, notes)?;
            Ok(service.map(|service| Destination::Grpc {
                service: service.into(),
                method: otlp::METHOD,
            }))
        })?,
        (None, Some(service)) => notes.within("http_service", |notes| {
            http_service_of(service, Scheme::Optional, PROTOBUF, notes)
        })?,
        // Envoy takes it, and tells nobody.
        (None, None) => None,
    };
    let always = match sampler {
        None => false,
        Some(TypedExtensionConfig { typed_config, name }) => {
            let kind = typed_config.as_ref().map_or("", |any| type_name(&any.type_url));
            let always = kind == "envoy.extensions.tracers.opentelemetry.samplers.v3.AlwaysOnSamplerConfig";
            if !always {
                notes.ignore(
                    "sampler",
                    format!("{name} ({kind}) is not supported; the chain's own shares decide"),
                );
            }
            always
        }
    };
    let queue = max_cache_size
        .and_then(|size| usize::try_from(size).ok())
        .filter(|size| *size > 0);
    let facts = facts.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let exporter = open(destination, otlp::envelope(facts), queue, context);
    Ok(match exporter {
        Some(exporter) => Provider::OpenTelemetry { exporter, always },
        None => Provider::None,
    })
}

fn owned((key, value): (&str, &str)) -> (String, String) {
    (key.to_owned(), value.to_owned())
}

/// What a detector finds out about us.
fn detect(detector: TypedExtensionConfig, notes: &mut Notes) -> Result<Vec<(String, String)>, Malformed> {
    let TypedExtensionConfig { name, typed_config } = detector;
    let any = typed_config.unwrap_or_default();
    Ok(match type_name(&any.type_url) {
        "envoy.extensions.tracers.opentelemetry.resource_detectors.v3.EnvironmentResourceDetectorConfig" => {
            pairs(&environment("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default(), ',')
        }
        "envoy.extensions.tracers.opentelemetry.resource_detectors.v3.DynatraceResourceDetectorConfig" => {
            DYNATRACE.iter().flat_map(|path| pairs(&dynatrace(path), '\n')).collect()
        }
        "envoy.extensions.tracers.opentelemetry.resource_detectors.v3.StaticConfigResourceDetectorConfig" => {
            let StaticConfigResourceDetectorConfig { attributes } = unpack(&any, Unknown::Ignored, notes)?;
            let mut facts: Vec<_> = attributes.into_iter().collect();
            facts.sort();
            facts
        }
        other => {
            notes.ignore("", format!("detector {name} ({other}) is not known"));
            Vec::new()
        }
    })
}

/// `key=value`, with this between them; what is none is left out.
fn pairs(text: &str, between: char) -> Vec<(String, String)> {
    let pairs = text.split(between).filter_map(|pair| pair.trim().split_once('='));
    pairs.filter(|(key, _)| !key.is_empty()).map(owned).collect()
}

/// A file of facts; one whose name stands in another has its path in there.
fn dynatrace(path: &str) -> String {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let text = read(Path::new(path));
    if path.starts_with('/') {
        return text;
    }
    match text.trim() {
        "" => text,
        named => read(Path::new(named)),
    }
}

fn zipkin(config: ZipkinConfig, context: &mut Context, notes: &mut Notes) -> Result<Provider, Malformed> {
    let ZipkinConfig {
        collector_cluster,
        collector_endpoint,
        trace_id_128bit,
        shared_span_context,
        collector_endpoint_version,
        collector_hostname,
        split_spans_for_request,
        trace_context_option,
        collector_service,
        timestamp_trace_ids,
    } = config;
    unneeded!(split_spans_for_request);
    ignore_set!(notes, timestamp_trace_ids);
    if collector_endpoint_version != CollectorEndpointVersion::HttpJson as i32 {
        notes.ignore(
            "collector_endpoint_version",
            "is not supported; spans are sent as JSON of version 2",
        );
    }
    let destination = match collector_service {
        Some(service) => notes.within("collector_service", |notes| {
            http_service_of(service, Scheme::Needed, JSON, notes)
        })?,
        None if collector_cluster.is_empty() => {
            return Err(notes.malformed("collector_cluster", "is empty, and there is no collector_service"));
        }
        None if collector_endpoint.is_empty() => return Err(notes.malformed("collector_endpoint", "is empty")),
        None => {
            let host = if collector_hostname.is_empty() {
                &collector_cluster
            } else {
                &collector_hostname
            };
            Some(server(
                &collector_cluster,
                host,
                &collector_endpoint,
                HeaderMap::new(),
                TIMEOUT,
                JSON,
                notes,
            )?)
        }
    };
    let exporter = open(destination, Envelope::Json, None, context);
    Ok(match exporter {
        Some(exporter) => Provider::Zipkin {
            exporter,
            propagation: Propagation {
                wide: trace_id_128bit,
                shared: shared_span_context != Some(false),
                w3c: trace_context_option == TraceContextOption::UseB3WithW3cPropagation as i32,
            },
        },
        None => Provider::None,
    })
}

/// The queue to a collector.
fn open(destination: Option<Destination>, envelope: Envelope, queue: Option<usize>, context: &Context) -> Option<Exporter> {
    let destination = destination?;
    Some(context.outputs.exports.open(Spec {
        name: destination.cluster().clone(),
        destination,
        envelope,
        kind: "traces",
        limits: Limits {
            queue: queue.unwrap_or(MAX_WAITING),
            ..Limits::default()
        },
    }))
}

const PROTOBUF: HeaderValue = HeaderValue::from_static("application/x-protobuf");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Whether a resource's address without a scheme has a host: Envoy's exporters do not agree.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scheme {
    /// It has.
    Optional,
    /// It is a path.
    Needed,
}

/// Compiles a collector over HTTP that takes messages of protocol buffers.
pub(crate) fn over_http(service: HttpService, notes: &mut Notes) -> Result<Option<Destination>, Malformed> {
    http_service_of(service, Scheme::Optional, PROTOBUF, notes)
}

fn http_service_of(
    service: HttpService,
    scheme: Scheme,
    content: HeaderValue,
    notes: &mut Notes,
) -> Result<Option<Destination>, Malformed> {
    let HttpService {
        http_uri,
        request_headers_to_add,
        formatters,
    } = service;
    ignore_set!(notes, formatters);
    let HttpUri {
        uri,
        timeout,
        http_upstream_type,
    } = http_uri.ok_or_else(|| notes.malformed("http_uri", "is missing"))?;
    let Some(HttpUpstreamType::Cluster(cluster)) = http_upstream_type.filter(|HttpUpstreamType::Cluster(name)| !name.is_empty())
    else {
        return Err(notes.malformed("http_uri.cluster", "is empty"));
    };
    let timeout = timeout
        .map(|timeout| duration("http_uri.timeout", timeout, notes))
        .transpose()?;
    let (host, path) = match (uri.split_once("://"), scheme) {
        (Some((_, rest)), _) => rest.split_at(rest.find('/').unwrap_or(rest.len())),
        (None, Scheme::Optional) => uri.split_at(uri.find('/').unwrap_or(uri.len())),
        (None, Scheme::Needed) => ("", uri.as_str()),
    };
    let host = if host.is_empty() { &cluster } else { host };
    let added = request_headers_to_add
        .into_iter()
        .filter_map(|option| option.header)
        .map(with_environment);
    let headers = grpc_service::fields(added.collect()).into_iter().collect();
    let timeout = timeout.filter(|timeout| !timeout.is_zero()).unwrap_or(TIMEOUT);
    server(&cluster, host, path, headers, timeout, content, notes).map(Some)
}

/// A field of whose value variables of the environment are a part.
fn with_environment(mut header: EnvoyHeader) -> EnvoyHeader {
    const BEGIN: &str = "%ENVIRONMENT(";
    while let Some((before, rest)) = header.value.split_once(BEGIN) {
        let Some((name, after)) = rest.split_once(")%") else { break };
        header.value = format!("{before}{}{after}", environment(name).unwrap_or_default());
    }
    header
}

fn server(
    cluster: &str,
    host: &str,
    path: &str,
    mut headers: HeaderMap,
    timeout: Duration,
    content: HeaderValue,
    notes: &Notes,
) -> Result<Destination, Malformed> {
    let authority =
        HeaderValue::try_from(host.replace('|', "_")).map_err(|_| notes.malformed("", format!("`{host}` cannot be a host")))?;
    let path = if path.is_empty() { "/" } else { path };
    let path = PathAndQuery::try_from(path).map_err(|_| notes.malformed("", format!("`{path}` is no path")))?;
    headers.insert(header::CONTENT_TYPE, content);
    let agent = HeaderValue::from_static(concat!("OTel-OTLP-Exporter-Cairn/", env!("CARGO_PKG_VERSION")));
    headers.entry(header::USER_AGENT).or_insert(agent);
    Ok(Destination::Http(Box::new(Server {
        cluster: cluster.into(),
        authority,
        path,
        headers,
        timeout,
    })))
}

#[allow(
    clippy::disallowed_methods,
    reason = "the tag is the setting: it names a variable, read once when it is compiled"
)]
pub(crate) fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}
