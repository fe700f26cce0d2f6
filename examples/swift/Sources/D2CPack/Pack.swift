import Foundation

/// A pack of d2c-mlx, plain or compact: `d2c-mlx run` writes them.
///
///     let pack = try Pack(directory: url)
///     if let adapter = try pack.adapter(for: "gec-de") { ... }
///
/// Everything in it is taken for a stranger's: what is not as docs/reference/formats.md has it is
/// refused, and no file outside the directory is read.
public final class Pack: @unchecked Sendable {
    public let directory: URL
    let manifest: Manifest
    // Set once, before anyone else has the pack.
    private var compact: CompactFile?

    /// Open a pack: sizes and hashes of its files, its index, and the layout of its adapters.
    public init(directory: URL) throws {
        self.directory = directory
        let path = directory.appendingPathComponent("manifest.json").path
        let content = try PackFile(path).json()
        do {
            manifest = try Manifest(content)
        } catch let error as PackError {
            throw error.at(shown(path, most: .max))
        }
        // Those that are read are verified as they are opened.
        let folders = Set(manifest.tasks.values.compactMap(\.string))
        let read = manifest.isCompact
            ? [Manifest.compactFile]
            : folders.flatMap { ["\($0)/adapters.safetensors", "\($0)/adapter_config.json"] }
        var problems = Problems()
        for name in Set(manifest.files.keys).subtracting(read).sorted() {
            _ = try problems.collect { try verified(name) }
        }
        if manifest.isCompact {
            // It stays open, so that what is read later is what was verified.
            compact = try problems.collect {
                try at(Manifest.compactFile) { try CompactFile(TensorFile(verified(Manifest.compactFile))) }
            }
            let n = compact?.names.count ?? .max
            for task in tasks {
                problems.need(manifest.tasks[task]?.int ?? -1 < n, "task \(shown(task)) has no adapter")
            }
        } else {
            for folder in folders.sorted() { _ = try problems.collect { try plain(folder) } }
        }
        try problems.check()
    }

    /// The tasks that the pack serves.
    public var tasks: [String] { manifest.tasks.keys.sorted() }
    /// Name of the base model that it was made for.
    public var model: String { manifest.model }
    public var isCompact: Bool { manifest.isCompact }
    /// Bytes of all files but the manifest.
    public var nBytes: Int { manifest.files.values.reduce(0) { $0 + $1.nBytes } }

    /// Hex SHA-256 of manifest.json, by which `d2c-mlx phone` knows the pack.
    public func manifestHash() throws -> String {
        try PackFile(directory.appendingPathComponent("manifest.json").path).sha256()
    }

    /// Name of the adapter that serves a task, the same for tasks that share one; nil for those that
    /// the base model serves. Throws PackError for a task that is not among `tasks`.
    public func name(for task: String) throws -> String? {
        guard let adapter = manifest.tasks[task] else { throw PackError("no task \(shown(task))") }
        return adapter.string ?? adapter.int.map { "cluster-\($0)" }
    }

    /// The adapter that serves a task; nil is the base model. Throws PackError for a task that is
    /// not among `tasks`, numbers that are none, and files that have changed.
    public func adapter(for task: String) throws -> Adapter? {
        guard let name = try name(for: task) else { return nil }
        if let compact, let k = manifest.tasks[task]?.int {
            return try at(Manifest.compactFile) {
                try compact.adapter(k, manifest.dtype, nLayers: manifest.nLayers)
            }
        }
        let (layout, file) = try plain(name)
        return try at(name) { try PlainAdapter.read(name, layout, file) }
    }

    /// Read every adapter once, as `d2c-mlx verify` does.
    public func verify() throws {
        var (seen, problems) = (Set<String>(), Problems())
        for task in tasks {
            if let name = try name(for: task), seen.insert(name).inserted {
                _ = try problems.collect { try adapter(for: task) }
            }
        }
        try problems.check()
    }

    private func plain(_ folder: String) throws -> (PlainAdapter.Layout, TensorFile) {
        var problems = Problems()
        let config = try problems.collect { try verified("\(folder)/adapter_config.json").json() }
        let file = try problems.collect { try TensorFile(verified("\(folder)/adapters.safetensors")) }
        try problems.check()
        // Both are there, since nothing was thrown.
        return (try at(folder) { try PlainAdapter.Layout(config: config!, tensors: file!) }, file!)
    }

    /// A file of the manifest, inside the pack and with the size and hash that the manifest has.
    private func verified(_ name: String) throws -> PackFile {
        guard let entry = manifest.files[name], let root = realPath(directory.path),
            let path = realPath(directory.path + "/" + name), path.utf8.starts(with: (root + "/").utf8)
        else { throw PackError("\(shown(directory.path, most: .max)): \(shown(name)): missing, but the manifest lists it") }
        let file = try PackFile(path)
        guard file.size == entry.nBytes, try file.sha256() == entry.sha256 else {
            throw PackError("\(shown(path, most: .max)): differs from the manifest's size or sha256; copy it again")
        }
        return file
    }

    private func at<T>(_ name: String, _ read: () throws -> T) throws -> T {
        do {
            return try read()
        } catch let error as PackError {
            throw error.at("\(shown(directory.path, most: .max)): \(shown(name))")
        }
    }
}

private func realPath(_ path: String) -> String? {
    guard let found = realpath(path, nil) else { return nil }
    defer { free(found) }
    return String(cString: found)
}
