//! Who we are and whom we believe: CSR, rotation, trust bundles, rustls configurations
