//! Which exchanges a log is about.

use cairn_exchange::{ResponseFlags, cel::Program};
use cairn_proto::envoy::config::accesslog::v3::{
    AccessLogFilter, AndFilter, ComparisonFilter, DurationFilter, ExtensionFilter, GrpcStatusFilter, HeaderFilter, LogTypeFilter,
    MetadataFilter, OrFilter, ResponseFlagFilter, RuntimeFilter, StatusCodeFilter, access_log_filter::FilterSpecifier,
    comparison_filter::Op, extension_filter,
};
use cairn_proto::envoy::{
    data::accesslog::v3::AccessLogType,
    extensions::access_loggers::filters::cel::v3::ExpressionFilter,
    r#type::v3::{FractionalPercent, fractional_percent::DenominatorType},
};
use cairn_telemetry::access_log::{Comparison, Filter, Sampled, When};

use crate::config::{
    any::{Typed, Unknown, typed, unpack},
    cel, headers,
    rbac::metadata,
    report::{Malformed, Notes},
};

/// Why there is no filter.
pub(super) enum NotDone {
    /// It cannot be done, and is listed: the log is left out, rather than logging more than was asked for.
    Listed,
    /// Envoy would not take it either.
    Malformed(Malformed),
}

impl From<Malformed> for NotDone {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

/// Compiles a filter.
pub(super) fn compile(filter: AccessLogFilter, notes: &mut Notes) -> Result<Filter, NotDone> {
    let AccessLogFilter { filter_specifier } = filter;
    match filter_specifier {
        None => Ok(Filter::Always),
        Some(FilterSpecifier::StatusCodeFilter(StatusCodeFilter { comparison })) => {
            let (comparison, than) = compare(comparison, notes)?;
            Ok(Filter::Status(comparison, than))
        }
        Some(FilterSpecifier::DurationFilter(DurationFilter { comparison })) => {
            let (comparison, than) = compare(comparison, notes)?;
            Ok(Filter::Duration(comparison, than))
        }
        Some(FilterSpecifier::ResponseFlagFilter(ResponseFlagFilter { flags: names })) => {
            let mut flags = ResponseFlags::NONE;
            for name in names {
                match ResponseFlags::from_short(&name) {
                    Some(flag) => flags.insert(flag),
                    None => notes.ignore("flags", format!("`{name}` never occurs")),
                }
            }
            Ok(Filter::Flags(flags))
        }
        Some(FilterSpecifier::AndFilter(AndFilter { filters })) => Ok(Filter::All(all(filters, notes)?)),
        Some(FilterSpecifier::OrFilter(OrFilter { filters })) => Ok(Filter::Any(all(filters, notes)?)),
        // Health checks are answered by an HTTP filter that istiod does not send.
        Some(FilterSpecifier::NotHealthCheckFilter(_)) => Ok(Filter::Always),
        Some(FilterSpecifier::TraceableFilter(_)) => Ok(Filter::Traceable),
        Some(FilterSpecifier::RuntimeFilter(filter)) => Ok(Filter::Sampled(sampled(filter, notes)?)),
        Some(FilterSpecifier::HeaderFilter(HeaderFilter { header })) => {
            let header = header.ok_or_else(|| notes.malformed("header", "is missing"))?;
            let matcher = notes.within("header", |notes| headers::matcher(header, notes))?;
            Ok(Filter::When(When::new(move |view| {
                view.request().is_some_and(|head| matcher.matches(head))
            })))
        }
        Some(FilterSpecifier::GrpcStatusFilter(GrpcStatusFilter { statuses, exclude })) => {
            let bit = |code: &i32| {
                u32::try_from(*code)
                    .ok()
                    .and_then(|code| 1_u32.checked_shl(code))
                    .unwrap_or(0)
            };
            let codes = statuses.iter().map(bit).fold(0, |codes, bit| codes | bit);
            Ok(Filter::GrpcStatus { codes, exclude })
        }
        Some(FilterSpecifier::MetadataFilter(filter)) => about_metadata(filter, notes),
        Some(FilterSpecifier::LogTypeFilter(LogTypeFilter { types, exclude })) => {
            let about = |kind: AccessLogType| types.contains(&kind.into()) != exclude;
            // What is logged here is logged at the end.
            Ok(Filter::Any(
                [
                    about(AccessLogType::DownstreamEnd).then_some(Filter::Requests(true)),
                    about(AccessLogType::TcpConnectionEnd).then_some(Filter::Requests(false)),
                ]
                .into_iter()
                .flatten()
                .collect(),
            ))
        }
        Some(FilterSpecifier::ExtensionFilter(extension)) => expression(extension, notes),
    }
}

/// The log is left out where its expression cannot be evaluated as it would be.
fn expression(filter: ExtensionFilter, notes: &mut Notes) -> Result<Filter, NotDone> {
    let ExtensionFilter { name, config_type } = filter;
    let Some(extension_filter::ConfigType::TypedConfig(any)) = config_type else {
        return Err(notes.malformed("", format!("filter {name} has no configuration")).into());
    };
    let Typed::Message("envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter", any) = typed(&any, notes)? else {
        notes.ignore("", format!("filter {name} is not supported; the log is left out"));
        return Err(NotDone::Listed);
    };
    let ExpressionFilter { expression, cel_config } = unpack(any, Unknown::Ignored, notes)?;
    let program = match Program::parse(&expression, cel::options(cel_config)) {
        Ok(program) => program,
        Err(error) if error.is_unsupported() => {
            notes.ignore("expression", format!("{error}; the log is left out"));
            return Err(NotDone::Listed);
        }
        Err(error) => return Err(notes.malformed("expression", error.to_string()).into()),
    };
    for attribute in program.unrecorded() {
        notes.ignore("expression", format!("{attribute} has no value here"));
    }
    let reads: Vec<_> = program.response_headers().cloned().collect();
    Ok(Filter::When(When::new(move |view| program.holds(view)).reading(reads)))
}

fn all(filters: Vec<AccessLogFilter>, notes: &mut Notes) -> Result<Box<[Filter]>, NotDone> {
    filters.into_iter().map(|filter| compile(filter, notes)).collect()
}

fn compare(comparison: Option<ComparisonFilter>, notes: &Notes) -> Result<(Comparison, u64), Malformed> {
    let ComparisonFilter { op, value } = comparison.ok_or_else(|| notes.malformed("comparison", "is missing"))?;
    let comparison = match Op::try_from(op) {
        Ok(Op::Eq) => Comparison::Equal,
        Ok(Op::Ge) => Comparison::AtLeast,
        Ok(Op::Le) => Comparison::AtMost,
        Ok(Op::Ne) => Comparison::NotEqual,
        Err(_) => return Err(notes.malformed("comparison.op", format!("{op} is not known"))),
    };
    // A value at run time is nothing that istiod sends; the default is what Envoy takes without one.
    let value = value.ok_or_else(|| notes.malformed("comparison.value", "is missing"))?;
    Ok((comparison, value.default_value.into()))
}

fn sampled(filter: RuntimeFilter, notes: &Notes) -> Result<Sampled, Malformed> {
    let RuntimeFilter {
        // Without a runtime the configured share holds.
        runtime_key: _,
        percent_sampled,
        use_independent_randomness,
    } = filter;
    let FractionalPercent { numerator, denominator } = percent_sampled.unwrap_or_default();
    let denominator = match DenominatorType::try_from(denominator) {
        Ok(DenominatorType::Hundred) => 100,
        Ok(DenominatorType::TenThousand) => 10_000,
        Ok(DenominatorType::Million) => 1_000_000,
        Err(_) => return Err(notes.malformed("percent_sampled.denominator", format!("{denominator} is not known"))),
    };
    Ok(Sampled {
        numerator: numerator.into(),
        denominator,
        independent: use_independent_randomness,
    })
}

fn about_metadata(filter: MetadataFilter, notes: &mut Notes) -> Result<Filter, NotDone> {
    let MetadataFilter {
        matcher,
        match_if_key_not_found,
    } = filter;
    let matcher = matcher.ok_or_else(|| notes.malformed("matcher", "is missing"))?;
    let matcher = notes.within("matcher", |notes| metadata(matcher, notes))?;
    let missing = match_if_key_not_found != Some(false);
    Ok(Filter::When(When::new(move |view| {
        let noted = &view.exchange.metadata;
        match noted.get(&matcher.filter, &matcher.path) {
            None => missing,
            Some(_) => matcher.matches(noted),
        }
    })))
}
