//! Objects that configuration puts into the filter state of requests, for formats behind it (`%FILTER_STATE(key:PLAIN)%`).

use std::sync::Arc;

use cairn_exchange::{
    Exchange,
    format::{Template, View},
};

use crate::{
    contract::{HttpFilter, Slot, Verdict},
    on_route::Scope,
};

/// The filter.
#[derive(Clone, Debug, Default)]
pub struct SetFilterState {
    /// Objects, in order.
    pub objects: Vec<Object>,
    /// The route is chosen again afterwards.
    pub clear_route_cache: bool,
}

/// One object.
#[derive(Clone, Debug)]
pub struct Object {
    /// Its key.
    pub key: Arc<str>,
    /// Its text.
    pub format: Template,
    /// An empty one is not put.
    pub skip_if_empty: bool,
    /// No later one replaces it.
    pub read_only: bool,
}

// === impl SetFilterState ===

impl HttpFilter for SetFilterState {
    fn name(&self) -> &str {
        "envoy.filters.http.set_filter_state"
    }

    fn decode_head(&self, _: &mut Slot, exchange: &mut Exchange, _: &Scope<'_>) -> Verdict {
        for object in &self.objects {
            let mut text = Vec::new();
            object.format.render_header(&View::new(exchange), &mut text);
            if text.is_empty() && object.skip_if_empty {
                continue;
            }
            let text = String::from_utf8_lossy(&text).into_owned();
            exchange.filter_state.set(object.key.clone(), text, object.read_only);
        }
        exchange.reroute |= self.clear_route_cache;
        Verdict::Continue
    }
}
