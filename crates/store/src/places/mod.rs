//! Where the parts of a store are: its packs in its directory or in a bucket, its catalog in a file of that directory or
//! on a PostgreSQL server. Every process that opens a store is given one of these.

mod elsewhere;
mod relocate;

use std::path::{Path, PathBuf};

use burgeon_api::Result;
pub use elsewhere::{Elsewhere, Files};
pub use relocate::{PACKS, relocate};

#[cfg(feature = "s3")]
use crate::objects::{Bucket, S3Settings};
use crate::{
    ids::OwnerId,
    objects::{Blocking, Directory},
    sql::Address,
};

/// The catalog's file in a store's directory.
pub(crate) const CATALOG: &str = "catalog.db";

/// See the module. Made of a path alone, all of it is in that directory.
#[derive(Clone, Debug)]
pub struct Places {
    /// The store's directory: for what lies nowhere else, and for the caches in any case.
    pub directory: PathBuf,
    #[cfg(feature = "s3")]
    pub objects: Option<S3Settings>,
    pub catalog: Option<Address>,
    /// Whose store it is; checked where the catalog is on a server, which others can reach too.
    pub owner: Option<Owner>,
}

/// Who a database belongs to: one data directory of one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub id: OwnerId,
    /// For people: `HOST:DIRECTORY`.
    pub name: String,
}

impl From<&Path> for Places {
    fn from(directory: &Path) -> Places {
        Places {
            directory: directory.into(),
            #[cfg(feature = "s3")]
            objects: None,
            catalog: None,
            owner: None,
        }
    }
}

impl From<&PathBuf> for Places {
    fn from(directory: &PathBuf) -> Places {
        directory.as_path().into()
    }
}

impl From<&Places> for Places {
    fn from(places: &Places) -> Places {
        places.clone()
    }
}

impl Places {
    /// The packs. A bucket is not asked for anything yet.
    ///
    /// # Errors
    /// Those of the file system, and `Invalid` for settings of a bucket that cannot be right.
    pub(crate) fn open_objects(&self) -> Result<Blocking> {
        #[cfg(feature = "s3")]
        if let Some(settings) = &self.objects {
            // What lies beside the packs in any case has its place here.
            Directory::open(&self.directory)?;
            return Bucket::new(settings.clone()).map(Blocking::Bucket);
        }
        Directory::open(&self.directory).map(Blocking::Directory)
    }

    /// The catalog's file, where it is one.
    pub(crate) fn catalog_file(&self) -> Option<PathBuf> {
        match &self.catalog {
            None => Some(self.directory.join(CATALOG)),
            Some(Address::Sqlite(path)) => Some(path.clone()),
            Some(Address::Postgres(_)) => None,
        }
    }

    pub(crate) fn catalog_address(&self) -> Address {
        self.catalog.clone().unwrap_or_else(|| Address::Sqlite(self.directory.join(CATALOG)))
    }

    /// Whether the packs are in its directory.
    pub(crate) fn has_objects_here(&self) -> bool {
        #[cfg(feature = "s3")]
        return self.objects.is_none();
        #[cfg(not(feature = "s3"))]
        true
    }

    /// Whether all of it is in its directory.
    pub(crate) fn is_local(&self) -> bool {
        self.has_objects_here() && self.catalog_file().is_some()
    }
}
