//! Images.

use std::path::Path;

use burgeon_api::{
    ByteSize, Error, Result,
    differences::{Chunks, DiffImage, Extent, Fact},
    history::Step,
    http::{BuildImage, CommitImage, ExportImage, ImportImage, Progress, SourceFile},
    image::{Boot, Image, ImageView},
};

use super::{Context, vm::now_s};
use crate::{
    arguments::ImageCommand,
    client::{Lines, escape},
    output,
};

pub(super) async fn run(context: &Context, command: ImageCommand) -> Result<u8> {
    match command {
        ImageCommand::Build { recipe, locked, force } => {
            let request = BuildImage { recipe: source(&recipe)?, locked, force };
            let lines = context.client()?.lines("/v1/images/build", Some(&request)).await?;
            follow(context, lines).await
        }
        ImageCommand::Import { file, name, max_size, platform } => {
            let file =
                std::fs::canonicalize(&file).map_err(|error| Error::io(format!("read {}", file.display()), &error))?;
            let file = file.to_str().ok_or_else(|| Error::invalid("the file's path is not UTF-8"))?.to_string();
            let request = ImportImage { file, name, max_size, platform };
            let lines = context.client()?.lines("/v1/images/import", Some(&request)).await?;
            follow(context, lines).await
        }
        ImageCommand::Commit { vm, name, message, snapshot } => {
            let request = CommitImage { vm, name, message, snapshot };
            let lines = context.client()?.lines("/v1/images/commit", Some(&request)).await?;
            follow(context, lines).await
        }
        ImageCommand::Export { image, file, force } => export(context, &image, &file, force).await,
        ImageCommand::Verify { image } => {
            let path = format!("/v1/images/{}/verify", escape(&image));
            let lines = context.client()?.lines(&path, Some(&serde_json::json!({}))).await?;
            super::store::checked(context, lines).await
        }
        ImageCommand::Ls(arguments) => list(context, arguments.quiet).await,
        ImageCommand::Show { image } => show(context, &image).await,
        ImageCommand::Diff { a, b, extents } => diff(context, &a, b, extents).await,
        ImageCommand::Serve { image, socket } => super::image_serve::serve(context, &image, &socket).await,
        ImageCommand::Push { image, remote } => super::image_remote::push(context, &image, &remote).await,
        ImageCommand::Pull { remote, image, digest } => {
            super::image_remote::pull(context, &remote, image, digest).await
        }
        ImageCommand::Remote { remote, quiet } => super::image_remote::list(context, &remote, quiet).await,
        ImageCommand::History { image } => history(context, &image).await,
        ImageCommand::Rm { images } => {
            let client = context.client()?;
            for image in images {
                client.delete(&format!("/v1/images/{}", escape(&image))).await?;
            }
            Ok(0)
        }
    }
}

/// A TOML file with what the server needs to know of where it lies.
pub(super) fn source(file: &Path) -> Result<SourceFile> {
    let name = file.display().to_string();
    let text = std::fs::read_to_string(file).map_err(|error| Error::io(format!("read {name}"), &error))?;
    let absolute = std::path::absolute(file).map_err(|error| Error::io(format!("find {name}"), &error))?;
    let directory = absolute.parent().unwrap_or(Path::new("/")).to_str().map(ToString::to_string);
    let directory = directory.ok_or_else(|| Error::invalid(format!("the path of {name} is not UTF-8")))?;
    Ok(SourceFile { file: name, text, directory })
}

async fn follow(context: &Context, lines: Lines<Progress>) -> Result<u8> {
    match super::store::follow(lines).await? {
        (Progress::Image(image), took) => finish(context, &image, took),
        _ => Err(Error::damaged("the server gave a strange answer")),
    }
}

async fn export(context: &Context, image: &str, file: &Path, force: bool) -> Result<u8> {
    let file = std::path::absolute(file).map_err(|error| Error::io(format!("find {}", file.display()), &error))?;
    let file = file.to_str().ok_or_else(|| Error::invalid("the file's path is not UTF-8"))?.to_string();
    let path = format!("/v1/images/{}/export", escape(image));
    let lines = context.client()?.lines(&path, Some(&ExportImage { file, force })).await?;
    let (Progress::Exported(exported), took) = super::store::follow(lines).await? else {
        return Err(Error::damaged("the server gave a strange answer"));
    };
    if context.json {
        output::json(&exported)?;
    } else {
        let (length, written) = (ByteSize(exported.length), ByteSize(exported.written));
        output::note(&format!("{length}, {written} of them written ({:.1} s)", took.as_secs_f64()));
        output::print(&format!("{}\n", exported.file));
    }
    Ok(0)
}

fn finish(context: &Context, image: &Image, took: std::time::Duration) -> Result<u8> {
    if context.json {
        output::json(image)?;
    } else {
        output::note(&format!("image {} is ready ({:.1} s)", image.name, took.as_secs_f64()));
        output::print(&format!("{}\n", image.name));
    }
    Ok(0)
}

fn kind(image: &Image) -> &'static str {
    match (image.boot, image.disk) {
        (Boot::Firmware, _) => "foreign disk",
        (Boot::Agent, Some(_)) => "disk",
        (Boot::Agent, None) => "initramfs",
    }
}

async fn list(context: &Context, quiet: bool) -> Result<u8> {
    let images: Vec<ImageView> = context.client()?.get("/v1/images").await?;
    if context.json {
        output::json(&images)?;
    } else if quiet {
        output::print(&images.iter().map(|view| format!("{}\n", view.name)).collect::<String>());
    } else {
        let now = now_s();
        let rows = images
            .iter()
            .map(|view| {
                let image = view.image.as_ref();
                vec![
                    view.name.clone(),
                    image.map_or("broken", kind).to_string(),
                    view.stored.to_string(),
                    image.and_then(|image| image.digest.get(..12)).unwrap_or_default().to_string(),
                    image.map(|image| output::age(now.saturating_sub(image.created_s))).unwrap_or_default(),
                    view.used_by.len().to_string(),
                    view.problem.clone().or(image.map(|image| image.description.clone())).unwrap_or_default(),
                ]
            })
            .collect();
        output::table(&["name", "kind", "stored", "digest", "age", "VMs", "description"], rows);
    }
    Ok(0)
}

async fn show(context: &Context, image: &str) -> Result<u8> {
    let view: ImageView = context.client()?.get(&format!("/v1/images/{}", escape(image))).await?;
    if context.json {
        output::json(&view)?;
        return Ok(0);
    }
    let Some(image) = &view.image else {
        return Err(Error::damaged(view.problem.unwrap_or_default()));
    };
    output::pairs(&[
        ("name", image.name.clone()),
        ("description", image.description.clone()),
        ("kind", kind(image).to_string()),
        ("digest", image.digest.clone()),
        ("recipe", image.recipe.clone()),
        ("kernel", image.kernel_release.clone()),
        ("disk", image.disk.map(|size| size.to_string()).unwrap_or_else(|| "none".into())),
        ("init", image.init.clone()),
        ("stored", view.stored.to_string()),
        ("used by", view.used_by.join(", ")),
    ]);
    Ok(0)
}

async fn history(context: &Context, name: &str) -> Result<u8> {
    let view: ImageView = context.client()?.get(&format!("/v1/images/{}", escape(name))).await?;
    let image = view.image.ok_or_else(|| Error::damaged(view.problem.unwrap_or_default()))?;
    if context.json {
        output::json(&image.history)?;
        return Ok(0);
    }
    if image.history.is_empty() {
        output::note(&format!("image {name} was made before histories were kept"));
        return Ok(0);
    }
    let now = now_s();
    let row = |step: &Step| {
        vec![
            output::age(now.saturating_sub(step.when_s)),
            step.origin.told(),
            step.digest.chars().take(12).collect(),
            ByteSize(step.bytes).to_string(),
            ByteSize(step.new_bytes).to_string(),
            step.burgeon.clone(),
        ]
    };
    output::table(&["age", "step", "digest", "bytes", "new", "burgeon"], image.history.iter().map(row).collect());
    Ok(0)
}

async fn diff(context: &Context, a: &str, other: String, extents: bool) -> Result<u8> {
    let path = format!("/v1/images/{}/diff", escape(a));
    let lines = context.client()?.lines(&path, Some(&DiffImage { other, extents })).await?;
    let (Progress::Differences(found), _) = super::store::follow(lines).await? else {
        return Err(Error::damaged("the server gave a strange answer"));
    };
    if context.json {
        output::json(&found)?;
        return Ok(0);
    }
    let chunks = |chunks: Chunks| format!("{} chunks, {}", chunks.chunks, ByteSize(chunks.bytes));
    let shared = found.shared_permille;
    output::pairs(&[
        ("different bytes", ByteSize(found.different_bytes).to_string()),
        ("in both", format!("{} ({}.{} % of {})", chunks(found.in_both), shared / 10, shared % 10, found.b.image)),
        (&format!("only {}", found.a.image), chunks(found.a.only_here)),
        (&format!("only {}", found.b.image), chunks(found.b.only_here)),
    ]);
    if !found.facts.is_empty() {
        let row = |fact: &Fact| vec![fact.what.clone(), fact.a.clone(), fact.b.clone()];
        output::print("\n");
        output::table(&["fact", &found.a.image, &found.b.image], found.facts.iter().map(row).collect());
    }
    if let Some(extents) = &found.extents {
        let row = |extent: &Extent| vec![extent.offset.to_string(), extent.length.to_string()];
        output::print("\n");
        output::table(&["offset", "length"], extents.iter().map(row).collect());
    }
    Ok(0)
}
