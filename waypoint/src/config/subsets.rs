//! Subsets (contract xds §5.3): how a cluster puts its endpoints together, what endpoints say of themselves, and what routes ask.
//! istiod's own subsets are clusters; these come by EnvoyFilter.

use std::sync::Arc;

use cairn_policy::balance::{Criteria, Fallback, Labels, Selector, SelectorFallback, SubsetRules};
use cairn_proto::envoy::config::{
    cluster::v3::cluster::{
        LbSubsetConfig,
        lb_subset_config::{
            LbSubsetFallbackPolicy, LbSubsetMetadataFallbackPolicy, LbSubsetSelector,
            lb_subset_selector::LbSubsetSelectorFallbackPolicy,
        },
    },
    core::v3::Metadata,
};
use prost_types::Struct;
use serde_json::Value;

use super::{
    report::{Malformed, Notes, unneeded},
    structure,
};

/// The namespace of metadata that balancing looks at.
pub(crate) const NAMESPACE: &str = "envoy.lb";

/// What an endpoint says of itself.
pub(crate) fn labels(of: &Struct) -> Labels {
    Labels::new(json(of).iter().map(|(name, value)| (name.as_str(), value)))
}

/// What a route asks of endpoints.
pub(crate) fn criteria(metadata: &Metadata) -> Option<Criteria> {
    metadata.filter_metadata.get(NAMESPACE).map(asked)
}

fn asked(of: &Struct) -> Criteria {
    Criteria::new(json(of).iter().map(|(name, value)| (name.as_str(), value)))
}

/// Values that are nested too deep are none.
fn json(of: &Struct) -> serde_json::Map<String, Value> {
    match structure::fields(of, 0) {
        Some(Value::Object(fields)) => fields,
        _ => Default::default(),
    }
}

/// Compiles the subsets of a cluster; `None` where nothing is selected, which is no subsets at all.
pub(crate) fn compile(config: LbSubsetConfig, notes: &mut Notes) -> Result<Option<Arc<SubsetRules>>, Malformed> {
    let LbSubsetConfig {
        fallback_policy,
        default_subset,
        subset_selectors,
        locality_weight_aware,
        scale_locality_weight,
        panic_mode_any,
        list_as_any,
        metadata_fallback_policy,
    } = config;
    if metadata_fallback_policy != LbSubsetMetadataFallbackPolicy::MetadataNoFallback as i32 {
        notes.refuse("metadata_fallback_policy", "is not supported");
    }
    let fallback = match LbSubsetFallbackPolicy::try_from(fallback_policy) {
        Ok(LbSubsetFallbackPolicy::NoFallback) => Fallback::Nobody,
        Ok(LbSubsetFallbackPolicy::AnyEndpoint) => Fallback::All,
        Ok(LbSubsetFallbackPolicy::DefaultSubset) => Fallback::Default,
        Err(_) => return Err(notes.malformed("fallback_policy", format!("{fallback_policy} is not known"))),
    };
    if subset_selectors.is_empty() {
        return Ok(None);
    }
    let selectors = subset_selectors.into_iter().enumerate();
    let selectors = selectors
        .map(|(index, selector)| notes.at("subset_selectors", index, |notes| compile_selector(selector, notes)))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Some(Arc::new(SubsetRules {
        selectors,
        fallback,
        default: default_subset.as_ref().map(asked).unwrap_or_default(),
        list_as_any,
        panic_to_all: panic_mode_any,
        by_locality: locality_weight_aware,
        scale_localities: scale_locality_weight,
    })))
}

fn compile_selector(selector: LbSubsetSelector, notes: &mut Notes) -> Result<Selector, Malformed> {
    use LbSubsetSelectorFallbackPolicy as Policy;
    let LbSubsetSelector {
        keys,
        single_host_per_subset,
        fallback_policy,
        fallback_keys_subset,
    } = selector;
    // Says how subsets of one endpoint each are stored.
    unneeded!(single_host_per_subset);
    if keys.is_empty() {
        return Err(notes.malformed("keys", "is empty"));
    }
    let fallback = match Policy::try_from(fallback_policy) {
        Ok(Policy::NotDefined) => SelectorFallback::AsCluster,
        Ok(Policy::NoFallback) => SelectorFallback::Of(Fallback::Nobody),
        Ok(Policy::AnyEndpoint) => SelectorFallback::Of(Fallback::All),
        Ok(Policy::DefaultSubset) => SelectorFallback::Of(Fallback::Default),
        Ok(Policy::KeysSubset) => {
            if fallback_keys_subset.is_empty()
                || fallback_keys_subset.len() >= keys.len()
                || !fallback_keys_subset.iter().all(|key| keys.contains(key))
            {
                return Err(notes.malformed("fallback_keys_subset", "is no real part of the keys"));
            }
            SelectorFallback::Keys(fallback_keys_subset.into_iter().map(Into::into).collect())
        }
        Err(_) => return Err(notes.malformed("fallback_policy", format!("{fallback_policy} is not known"))),
    };
    Ok(Selector::new(keys, fallback))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_that_falls_back_to_no_part_of_its_keys_is_malformed() {
        for (keys, fewer, fits) in [
            (&["a", "b"][..], &["a"][..], true),
            (&["a", "b"], &["a", "b"], false),
            (&["a", "b"], &["c"], false),
            (&["a", "b"], &[], false),
            (&[], &[], false),
        ] {
            let texts = |list: &[&str]| list.iter().map(|key| (*key).to_owned()).collect();
            let config = LbSubsetConfig {
                subset_selectors: vec![LbSubsetSelector {
                    keys: texts(keys),
                    fallback_policy: LbSubsetSelectorFallbackPolicy::KeysSubset as i32,
                    fallback_keys_subset: texts(fewer),
                    ..Default::default()
                }],
                ..Default::default()
            };
            assert_eq!(compile(config, &mut Notes::of("web")).is_ok(), fits, "{keys:?} {fewer:?}");
        }
    }

    #[test]
    fn a_cluster_without_selectors_has_no_subsets() {
        let config = LbSubsetConfig {
            fallback_policy: LbSubsetFallbackPolicy::NoFallback as i32,
            ..Default::default()
        };
        assert_eq!(compile(config, &mut Notes::of("web")).unwrap(), None);
    }
}
