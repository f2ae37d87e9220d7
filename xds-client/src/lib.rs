//! Delta ADS: stream, subscriptions, nonces, resume; hands out what changed and answers with the consumer's verdict
