//! Response flags: Envoy's short words for what went wrong with an exchange.

use std::fmt;

/// A set of response flags; prints as Envoy does, comma-separated in Envoy's order, or `-` when empty.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ResponseFlags(u64);

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal $short:literal $long:literal;)*) => {
        impl ResponseFlags {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*
        }
        /// Every flag in Envoy's order: the flag, its short word, its long name.
        const NAMES: &[(ResponseFlags, &str, &str)] = &[$((ResponseFlags::$name, $short, $long),)*];
    };
}

flags! {
    /// Health check of the local node failed.
    FAILED_LOCAL_HEALTH_CHECK = 0 "LH" "FailedLocalHealthCheck";
    /// No healthy endpoint.
    NO_HEALTHY_UPSTREAM = 1 "UH" "NoHealthyUpstream";
    /// The request, a try of it, or the stream's maximum duration timed out.
    UPSTREAM_REQUEST_TIMEOUT = 2 "UT" "UpstreamRequestTimeout";
    /// The proxy reset the stream.
    LOCAL_RESET = 3 "LR" "LocalReset";
    /// The upstream reset the stream.
    UPSTREAM_REMOTE_RESET = 4 "UR" "UpstreamRemoteReset";
    /// No connection to the upstream could be made.
    UPSTREAM_CONNECTION_FAILURE = 5 "UF" "UpstreamConnectionFailure";
    /// The upstream closed its connection.
    UPSTREAM_CONNECTION_TERMINATION = 6 "UC" "UpstreamConnectionTermination";
    /// A circuit breaker refused.
    UPSTREAM_OVERFLOW = 7 "UO" "UpstreamOverflow";
    /// No route or filter chain.
    NO_ROUTE_FOUND = 8 "NR" "NoRouteFound";
    /// The fault filter delayed the request.
    DELAY_INJECTED = 9 "DI" "DelayInjected";
    /// The fault filter answered.
    FAULT_INJECTED = 10 "FI" "FaultInjected";
    /// A rate limit answered.
    RATE_LIMITED = 11 "RL" "RateLimited";
    /// External authorization denied.
    UNAUTHORIZED_EXTERNAL_SERVICE = 12 "UAEX" "UnauthorizedExternalService";
    /// The rate limit service failed.
    RATE_LIMIT_SERVICE_ERROR = 13 "RLSE" "RateLimitServiceError";
    /// The client went away.
    DOWNSTREAM_CONNECTION_TERMINATION = 14 "DC" "DownstreamConnectionTermination";
    /// All attempts were used.
    UPSTREAM_RETRY_LIMIT_EXCEEDED = 15 "URX" "UpstreamRetryLimitExceeded";
    /// The stream idle timeout.
    STREAM_IDLE_TIMEOUT = 16 "SI" "StreamIdleTimeout";
    /// A header that must be valid was not.
    INVALID_ENVOY_REQUEST_HEADERS = 17 "IH" "InvalidEnvoyRequestHeaders";
    /// The client broke the protocol.
    DOWNSTREAM_PROTOCOL_ERROR = 18 "DPE" "DownstreamProtocolError";
    /// The maximum stream duration passed.
    UPSTREAM_MAX_STREAM_DURATION_REACHED = 19 "UMSDR" "UpstreamMaxStreamDurationReached";
    /// Answered from a cache.
    RESPONSE_FROM_CACHE_FILTER = 20 "RFCF" "ResponseFromCacheFilter";
    /// A filter's configuration was not there.
    NO_FILTER_CONFIG_FOUND = 21 "NFCF" "NoFilterConfigFound";
    /// The connection's maximum duration passed.
    DURATION_TIMEOUT = 22 "DT" "DurationTimeout";
    /// The upstream broke the protocol.
    UPSTREAM_PROTOCOL_ERROR = 23 "UPE" "UpstreamProtocolError";
    /// No such cluster.
    NO_CLUSTER_FOUND = 24 "NC" "NoClusterFound";
    /// The overload manager refused.
    OVERLOAD_MANAGER = 25 "OM" "OverloadManagerTerminated";
    /// A name could not be resolved.
    DNS_RESOLUTION_FAILED = 26 "DF" "DnsResolutionFailed";
    /// The proxy is draining.
    DROP_OVERLOAD = 27 "DO" "DropOverload";
    /// The client's stream was reset by it.
    DOWNSTREAM_REMOTE_RESET = 28 "DR" "DownstreamRemoteReset";
    /// The unconditional drop of a cluster's endpoints.
    UNCONDITIONAL_DROP_OVERLOAD = 29 "UDO" "UnconditionalDropOverload";
}

// === impl ResponseFlags ===

impl ResponseFlags {
    /// No flag.
    pub const NONE: Self = Self(0);

    /// As a number: the bits are Envoy's.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Adds the flags of `other`.
    pub fn insert(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Takes the flags of `other` away.
    pub fn remove(&mut self, other: Self) {
        self.0 &= !other.0;
    }

    /// Whether all flags of `other` are set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any flag of `other` is set.
    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether no flag is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The flag with this short word.
    pub fn from_short(short: &str) -> Option<Self> {
        NAMES.iter().find(|(_, name, _)| *name == short).map(|(flag, _, _)| *flag)
    }

    /// The long names, `NoHealthyUpstream` …, in Envoy's order.
    pub fn long_names(self) -> impl Iterator<Item = &'static str> {
        NAMES
            .iter()
            .filter(move |(flag, _, _)| self.contains(*flag))
            .map(|(_, _, long)| *long)
    }
}

impl std::ops::BitOr for ResponseFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for ResponseFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        let mut separator = "";
        for (_, short, _) in NAMES.iter().filter(|(flag, _, _)| self.contains(*flag)) {
            f.write_str(separator)?;
            f.write_str(short)?;
            separator = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for ResponseFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_print_as_envoys() {
        assert_eq!(ResponseFlags::NONE.to_string(), "-");
        let both = ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED | ResponseFlags::UPSTREAM_CONNECTION_FAILURE;
        assert_eq!(both.to_string(), "UF,URX");
        assert_eq!(
            ResponseFlags::from_short("UAEX"),
            Some(ResponseFlags::UNAUTHORIZED_EXTERNAL_SERVICE)
        );
    }
}
