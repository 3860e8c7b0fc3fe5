//! The steps that made an image, in its `image.json`.

use burgeon_api::{
    history::{Origin, Step},
    image::Image,
};

use crate::store::KeptDisk;

/// The version that steps name: that of the whole workspace.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The image with one more step at the end of its history. `image` is as it will be published, digest and map included;
/// what it was made from has left its own steps in its history, or none. `disk` tells what storing its disk took.
/// `now_s` is in seconds since 1970.
#[must_use]
pub fn with_step(mut image: Image, origin: Origin, disk: &KeptDisk, now_s: u64) -> Image {
    image.history.push(Step {
        origin,
        when_s: now_s,
        burgeon: VERSION.into(),
        digest: image.digest.clone(),
        map: image.map.clone(),
        bytes: disk.bytes,
        new_bytes: disk.new_bytes,
    });
    image
}
